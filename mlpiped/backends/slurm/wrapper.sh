#!/bin/sh
# One attempt of a step of mlpiped
# The supervisor takes the place of this shell: what Slurm signals to the batch script, it gets.
tools=@TOOLS@
root=@ROOT@
token=@TOKEN@
order=$root/slurm/orders/$token
folder=$root/jobs/$token
test -e "$order" || test -e "$folder/job.json" || exit 75 # somebody else has it, or nobody shall
mkdir -p "$folder" && exec >>"$folder/slurm.out" 2>&1 || exit 69
if test -e "$order"; then # else one that Slurm ended in this very moment has made it: the claim decides
    mine=$folder/.job.$(hostname).$$
    line=$(printf %s "$token" | sed 's/[.]/\\&/g')
    (umask 077 && sed -n "s/^$line //p" "$order" >"$mine") && mv -f "$mine" "$folder/job.json" && rm -f "$order" ||
        ! test -e "$order" || exit 69
fi
for python in @PYTHON@ python3 python; do
    if "$python" -I -S -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
        exec "$python" -I -S "$tools/supervisor.py" --run "$folder"
    fi
done
echo "no Python 3.9 or newer on $(hostname)" >&2
exit 69

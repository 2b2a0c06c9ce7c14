#!/bin/sh
# One attempt of a step of mlpiped: @TOKEN@
# The supervisor takes the place of this shell: what Slurm signals to the batch script, it gets.
tools=@TOOLS@
folder=@FOLDER@
for python in @PYTHON@ python3 python; do
    if "$python" -I -S -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
        exec "$python" -I -S "$tools/supervisor.py" --run "$folder"
    fi
done
echo "no Python 3.9 or newer on $(hostname)" >&2
exit 69

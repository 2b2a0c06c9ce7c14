# sh apptainer.sh FOLDER PROGRAM PREFIX MARK IMAGE WORD…
# Become `PROGRAM WORD…`, which runs a command in IMAGE, if that is there and still the file of which MARK was taken (`-`:
# of none). What
# stands in the way is told on stderr and in FOLDER/refused, and nothing starts.
folder=$1 program=$2 prefix=$3 mark=$4 image=$5
shift 5
refuse() {
    echo "$1" >&2
    echo "$1" > "$folder/refused"
    exit 78
}
command -v "$program" > /dev/null 2>&1 || refuse "there is no \`$program\` on $(hostname), where Slurm has sent the step"
[ -r "$image" ] || refuse "image $image cannot be read on $(hostname)"
[ "$mark" = - ] || [ "$(stat -c %i-%s-%.9Y "$image")" = "$mark" ] ||
    refuse "image $image has changed since the run looked at it: what is there now is for the next run"
queue='SLURM_[A-Za-z0-9_]*\|CUDA_VISIBLE_DEVICES\|ROCR_VISIBLE_DEVICES\|GPU_DEVICE_ORDINAL\|ZE_AFFINITY_MASK'
for name in $(env | sed -n "s/^\($queue\)=.*/\1/p"); do
    eval "export ${prefix}ENV_$name=\"\$$name\""
done
exec "$program" "$@"

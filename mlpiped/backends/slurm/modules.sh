# sh modules.sh FOLDER INIT "MODULE …" "NAME …" COMMAND…
# Load modules, then become the command. INIT is sourced to define `module`; "" looks where sites have it. NAMES are
# variables that the step's author has set: no module overrides them. What stands in the way is told on stderr and in
# FOLDER/refused, and the command does not start.
mlp_folder=$1 mlp_init=$2 mlp_modules=$3 mlp_own=$4
shift 4
mlp_refuse() {
    trap - EXIT
    echo "$1" >&2
    echo "$1" > "$mlp_folder/refused"
    exit 78
}
mlp_has() {
    command -v module > /dev/null 2>&1
}
for mlp_name in $mlp_own; do
    eval "mlp_own_$mlp_name=\$$mlp_name"
done
trap 'mlp_refuse "the shell ended while it loaded modules on $(hostname)"' EXIT
if [ -n "$mlp_init" ]; then
    [ -r "$mlp_init" ] || mlp_refuse "modules cannot be loaded on $(hostname): no file $mlp_init"
    . "$mlp_init"
    mlp_has || mlp_refuse "modules cannot be loaded on $(hostname): $mlp_init does not define \`module\`"
else
    for mlp_place in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh \
        "${MODULESHOME:-/none}/init/sh" "${LMOD_PKG:-/none}/init/sh" \
        /usr/share/lmod/lmod/init/sh /usr/share/modules/init/sh /usr/share/Modules/init/sh; do
        if [ -r "$mlp_place" ]; then
            . "$mlp_place"
            mlp_has && break
        fi
    done
    if ! mlp_has && [ -x "${LMOD_CMD:-}" ]; then
        module() { eval "$("$LMOD_CMD" sh "$@")"; }
    fi
    mlp_has || mlp_refuse "no environment modules on $(hostname): set modules_init of the compute to the file that defines \`module\`"
fi
module load $mlp_modules 2> "$mlp_folder/modules.said" < /dev/null
mlp_status=$?
cat "$mlp_folder/modules.said" >&2
if [ "$mlp_status" -ne 0 ]; then
    mlp_words=$(tr -s '[:space:]' ' ' < "$mlp_folder/modules.said" | cut -c 1-400)
    mlp_refuse "cannot load modules $mlp_modules: ${mlp_words:-module load ended with $mlp_status}"
fi
for mlp_name in $mlp_own; do
    eval "export $mlp_name=\"\$mlp_own_$mlp_name\""
done
if [ -n "${VIRTUAL_ENV:-}" ]; then
    PATH=$VIRTUAL_ENV/bin:$PATH
fi
trap - EXIT
exec "$@"

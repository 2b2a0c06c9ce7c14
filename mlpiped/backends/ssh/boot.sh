# The first bytes on a channel: puts the scripts where they stay, and becomes one of them.
# Reads `WORK INSTANCE DIGEST` (%b-encoded), then `NAME SIZE` and so many bytes for each script, then `go`.
echo
echo --mlpiped--
# So many bytes and no more, in one piece: `head` of some boxes reads on.
take() {
    dd bs="$1" count=1 iflag=fullblock 2>/dev/null
}
# A logind may end all that a user has started, with his session.
if [ -n "${XDG_SESSION_ID-}" ] && [ "$(id -u)" != 0 ] && command -v loginctl >/dev/null; then
    case $(timeout 5 loginctl show-user -p KillUserProcesses -p KillExcludeUsers 2>/dev/null) in
    *KillExcludeUsers=*"$(id -un)"*) ;;
    *KillUserProcesses=yes*)
        echo "x its logind ends steps with the connection: it needs KillUserProcesses=no in its /etc/systemd/logind.conf"
        exit 1
        ;;
    esac
fi
umask_before=$(umask)
umask 077
read -r work instance digest
work=$(printf '%b' "$work")
case $work in
"~") work=$HOME ;;
"~/"*) work=$HOME/${work#??} ;;
esac
root=$work/$instance
bin=$root/.bin/$digest
mkdir -p "$bin" "$root/.cas" "$root/.events" "$root/.new" "$root/.envs" "$root/.used" "$root/.pruning" "$root/.boot" 2>/dev/null ||
    { echo "x the folder cannot be made: $root"; exit 1; }
[ "$(cat "$root/.no-params.json" 2>/dev/null)" = '{}' ] || printf '{}' >"$root/.no-params.json"
root=$(cd "$root" && pwd -P)
bin=$root/.bin/$digest
while read -r name size && [ "$name" != go ]; do
    text=$(take "$size")
    [ "$(cat "$bin/$name" 2>/dev/null)" != "$text" ] || continue # a power cut may have left less
    printf '%s\n' "$text" >"$bin/$name.$$" && mv -T "$bin/$name.$$" "$bin/$name" ||
        { echo "x a file cannot be written: $bin/$name"; exit 1; }
done
umask "$umask_before"
read -r steady python
exec sh "$bin/agent.sh" "$root" "$(printf '%b' "$python")" "$steady"

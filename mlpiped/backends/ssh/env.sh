# Builds a virtual environment, once per content: sh env.sh ROOT NAME PYTHON, with the requirements as stdin.
# The last line is `ok`, `bad TEXT` (the requirements cannot be had) or `fault TEXT` (this box cannot, for now).
. "${0%/*}/durable.sh"
cd "$1/.envs" || { echo "fault its folder is gone"; exit 0; }
name=$2 python=$3 log=$2.log
cat >"$name.$$.txt"
trap 'rm -f "$name.$$.txt"' EXIT
last() {
    tail -n 30 "$log" | while read -r line; do
        case $line in [Ee][Rr][Rr][Oo][Rr]*) printf '%s; ' "$line" ;; esac
    done
}
home=$PWD/$name
usable() { [ -e "$home/.mlpiped-complete" ] && [ -x "$home/bin/python" ]; }
# The lock names its holder: one that was killed does not hold it for ever.
while ! usable && ! mkdir "$name.lock" 2>/dev/null; do
    holder=
    { read -r holder <"$name.lock/pid"; } 2>/dev/null
    [ -n "$holder" ] && [ ! -d "/proc/$holder" ] && rm -rf "$name.lock"
    sleep 0.3
done
usable && { true >"../.used/$name"; echo ok; exit 0; }
echo $$ >"$name.lock/pid"
trap 'rm -rf "$name.lock" "$name.$$.txt"' EXIT
trap 'exit 1' HUP INT TERM
rm -rf "$home"
command -v "$python" >/dev/null || { echo "bad \`$python\` is not installed on the box"; exit 0; }
"$python" -m venv "$home" >"$log" 2>&1 ||
    { echo "fault cannot make a virtual environment there (Debian: install \`python3-venv\`): $(tail -n 2 "$log" | tr '\n' ' ')"; exit 0; }
if [ -s "$name.$$.txt" ]; then
    "$home/bin/python" -m pip install --disable-pip-version-check --no-input -r "$name.$$.txt" >>"$log" 2>&1 || {
        kind=bad
        for sign in NewConnectionError ConnectTimeout ReadTimeout 'name resolution' ProxyError '503 Server'; do
            case $(cat "$log") in *"$sign"*) kind=fault ;; esac
        done
        echo "$kind cannot install the step's requirements: $(last)"
        exit 0
    }
fi
true >"../.used/$name"
steady .. "$home" && : >"$home/.mlpiped-complete" || { echo "fault the environment cannot be written there"; exit 0; }
lasts "$home"
echo ok

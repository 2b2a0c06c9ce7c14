# Files and folders through a channel, with sh and coreutils alone.
#
#   sh tree.sh put ROOT PLACE             from stdin into the folder PLACE, which appears by one rename: `ok`
#   sh tree.sh get ROOT TOKEN LIMIT NAME… what there is of these in a job's folder; `big` when it is over LIMIT bytes
#   sh tree.sh logs ROOT                  `TOKEN STREAM OFFSET LIMIT` a line; `OVER SIZE`, and so many bytes, for each
#
# An entry is a line, and to us the bytes of a file behind it:
#   d NAME · l NAME TARGET · f|x SIZE NAME (put) · f|x SIZE SHA256 NAME (get) · s NAME (neither) · t BYTES
# (of all, get without a LIMIT) · end
# From us several files come at once: their lines, `bytes`, and the bytes of them all.
# Names: to us %b-encoded, from us as they are, or `:` and their bytes in hexadecimal.

set -f
N='
'

put() {
    cd "$1" || exit 1
    place=$2 root=$PWD
    read -r self rest </proc/$$/stat
    rest=${rest##*) }
    set -- $rest
    shift 19
    draft=$PWD/.new/put.$$.$1
    [ ! -e "$place" ] || { cat >/dev/null; echo ok; exit 0; }
    mkdir -m 700 "$draft" && cd "$draft" || exit 1
    trap 'chmod -R u+rwX "$draft" 2>/dev/null; rm -rf "$draft"' EXIT
    trap 'exit 1' HUP INT TERM
    whole=0
    while read -r kind one two; do # a last line that is cut fails here
        case $kind in
        end)
            whole=1
            break
            ;;
        d | l) decode "$one" ;;
        *) decode "$two" ;;
        esac
        case $kind in
        d) mkdir "./$decoded" ;;
        f) head -c "$one" >"./$decoded" ;;
        x) head -c "$one" >"./$decoded" && chmod u+x "./$decoded" ;;
        l) link=$decoded && decode "$two" && ln -s "$decoded" "./$link" ;;
        *) false ;;
        esac || exit 1
    done
    [ "$whole" = 1 ] || exit 1
    cd "$root" || exit 1
    case $place in
    .cas/*) chmod -R a-w,a+rX "$draft"; chmod u+w "$draft" ;; # steps share it
    */*) mkdir -p -m 700 "${place%/*}" ;;
    esac
    case $place in */*/*) mkdir -p -m 700 "${place%%/*}" "${place%/*}" ;; esac
    mv -T "$draft" "$place" 2>/dev/null || [ -e "$place" ] || exit 1
    echo ok
}

decode() {
    decoded=$1
    case $1 in
    *\\*)
        decoded=$(printf '%b' "$1"; echo .)
        decoded=${decoded%.}
        ;;
    esac
}

encode() {
    encoded=$1
    case $1 in
    *[!A-Za-z0-9._/,=+@%-]*)
        encoded=:
        for word in $(printf '%s' "$1" | od -An -v -tx1); do encoded=$encoded$word; done
        ;;
    esac
}

get() {
    cd "$1/$2" || { echo "end"; exit 0; }
    limit=$3
    shift 3
    there=
    for name in "$@"; do
        [ -e "$name" ] && there="$there $name"
    done
    set -- $there
    [ $# -gt 0 ] || { echo "end"; exit 0; }
    if [ -n "$limit" ]; then
        total=$(du -sbc -- "$@" 2>/dev/null | tail -n 1)
        [ "${total%%[!0-9]*}" -le "$limit" ] || { echo big; exit 0; }
    else
        total=$(du -sbc -- "$@" 2>/dev/null | tail -n 1)
        echo "t ${total%%[!0-9]*}"
    fi
    entries "$@"
    echo end
}

# Of "$@": what holds nothing as lines, the regular files after them, then what is in the folders.
entries() {
    for name in "$@"; do
        shift
        if [ ! -h "$name" ] && [ -f "$name" ]; then
            [ -r "$name" ] || chmod u+r "$name"
            set -- "$@" "$name"
            continue
        fi
        encode "$name"
        if [ -h "$name" ]; then
            entry=$encoded
            to=$(readlink -n -- "$name"; echo .)
            encode "${to%.}"
            printf 'l %s %s\n' "$entry" "$encoded"
        elif [ -d "$name" ]; then
            [ -r "$name" ] && [ -x "$name" ] || chmod u+rx "$name"
            printf 'd %s\n' "$encoded"
            (below "$name")
        else
            printf 's %s\n' "$encoded"
        fi
    done
    [ $# -eq 0 ] || files "$@"
}

# In pieces: a command takes so many arguments only.
below() {
    set +f
    set -- "$1"/* "$1"/.[!.]* "$1"/..?*
    set -f
    while [ $# -gt 200 ]; do
        eval "there $some"
        shift 200
    done
    there "$@"
}

there() {
    for name in "$@"; do
        shift
        { [ -e "$name" ] || [ -h "$name" ]; } && set -- "$@" "$name"
    done
    [ $# -eq 0 ] || entries "$@"
}

files() {
    sha256sum -- "$@" | while read -r sum rest && read -r size <&3; do
        mode=f
        [ ! -x "$1" ] || mode=x
        encode "$1"
        shift
        printf '%s %s %s %s\n' "$mode" "$size" "${sum#\\}" "$encoded"
    done 3<<EOF
$(stat -c %s -- "$@")
EOF
    echo bytes
    cat -- "$@"
}

logs() {
    cd "$1" || exit 1
    boot_id
    while read -r T name offset limit; do
        over=1
        claimed && [ ! -e "$T/exit.json" ] && [ "$who" != fenced ] && alive && over=0
        size=0
        [ ! -e "$T/$name" ] || size=$(stat -c %s -- "$T/$name")
        [ "$offset" -ge 0 ] || offset=$((size + offset))
        [ "$offset" -ge 0 ] || offset=0
        size=$((size - offset))
        [ "$size" -le "$limit" ] || size=$limit
        [ "$size" -ge 0 ] || size=0
        echo "$over $size"
        [ "$size" = 0 ] || tail -c +$((offset + 1)) -- "$T/$name" | head -c "$size"
    done
}

some='' count=0
while [ "$count" -lt 200 ]; do
    count=$((count + 1))
    some="$some \"\${$count}\""
done
mode=$1
shift
case $mode in
put | get) "$mode" "$@" ;;
logs)
    . "${0%/*}/step.sh"
    "$mode" "$@"
    ;;
esac

# Files and folders through a channel, with sh and coreutils alone.
#
#   sh tree.sh put ROOT PLACE [KEY]       from stdin into the folder PLACE, which appears by one rename: `ok`. With a
#                                         KEY what came is kept when the way breaks: `there`, or first `from UNITS BYTES`
#                                         says how many entries are here, and how much of the file after them; what comes
#                                         after more than `0 0` must end with a digest
#   sh tree.sh get ROOT TOKEN LIMIT NAME… what there is of these in a job's folder; `big` when it is over LIMIT bytes
#   sh tree.sh logs ROOT                  `TOKEN STREAM OFFSET LIMIT` a line; `OVER SIZE`, and so many bytes, for each
#
# An entry is a line, and to us the bytes of a file behind it:
#   d NAME · l NAME TARGET · f|x SIZE NAME · s NAME (neither) · t BYTES (of all, get with `all` or `ask`) · end · T BYTES: an archive of small ones, where there is `tar` (put) · f+|x+ SIZE NAME:
# the rest of a file (put) · end SHA256: and all that is here, as lines, sorted, has that digest (put)
# From us several files come at once: their lines, `bytes`, and the bytes of them all; or with `ask` for a LIMIT their
# lines, `ask`, and after a line with how many of their bytes are there the others. Then of each `sum SHA256`.
# Names: to us %b-encoded, from us as they are, or `:` and their bytes in hexadecimal.

set -f
N='
'

put() {
    cd "$1" || exit 1
    place=$2 key=${3-} root=$PWD count=0 name= had=
    if [ -e "$place" ]; then
        [ -n "$key" ] && echo there || { cat >/dev/null; echo ok; }
        exit 0
    fi
    . "${0%/*}/step.sh"
    . "${0%/*}/durable.sh"
    born $$
    draft=$PWD/.new/put.$$.$born tree=$PWD/.new/put.$$.$born
    if [ -n "$key" ]; then
        draft=$PWD/.new/part.$$.$born.$key
        tree=$draft/tree
        inherit && cd "$tree" || exit 1
        [ "$count $there" = '0 0' ] || had=1
        echo "from $count $there"
    else
        mkdir -m 700 "$draft" && cd "$draft" || exit 1
        trap 'remove "$draft"' EXIT
        trap 'exit 1' HUP INT TERM
    fi
    whole=0
    while read -r kind one two; do # a last line that is cut fails here
        [ -z "$key" ] || printf '%s %s\n' "$count" "${two:--}" >"$draft/count"
        if [ "$kind" = end ]; then
            whole=1
            break
        fi
        entry && count=$((count + 1)) && continue
        ! read -r kind || remove "$draft" # there is more: it is not the way that broke
        exit 1
    done
    [ "$whole" = 1 ] || exit 1
    if [ -n "$one$had" ] && [ "$(manifest)" != "$one" ]; then
        remove "$draft"
        echo 'it is not what was sent'
        exit 1
    fi
    cd "$root" || exit 1
    case $place in
    .cas/*) # steps share it
        chmod -R a-w,a+rX "$tree"
        chmod u+w "$tree"
        true >".used/${place#.cas/}"
        ;;
    */*) mkdir -p -m 700 "${place%/*}" ;;
    esac
    case $place in */*/*) mkdir -p -m 700 "${place%%/*}" "${place%/*}" ;; esac
    steady . "$tree" && { mv -T "$tree" "$place" 2>/dev/null || [ -e "$place" ]; } || exit 1
    case $place in .cas/*) lasts "$place" ;; esac
    [ -z "$key" ] || remove "$draft"
    echo ok
}

# So many bytes and no more: `head` of some boxes reads on.
take() {
    [ "$1" -lt $BLOCK ] || dd bs=$BLOCK count=$(($1 / BLOCK)) iflag=fullblock 2>/dev/null || return
    [ $(($1 % BLOCK)) = 0 ] || dd bs=$(($1 % BLOCK)) count=1 iflag=fullblock 2>/dev/null
}

# One unit of what comes; said again, it is made again.
entry() {
    case $kind in
    T)
        take "$one" | tar -xomf -
        return
        ;;
    d | l) decode "$one" ;;
    *) decode "$two" ;;
    esac
    case $kind in
    d) mkdir -p "./$decoded" ;;
    [fx]) take "$one" >"./$decoded" ;;
    [fx]+) take "$one" >>"./$decoded" ;;
    l) link=$decoded && decode "$two" && ln -sfn "$decoded" "./$link" ;;
    *) false ;;
    esac || return
    case $kind in x*) chmod u+x "./$decoded" ;; esac
}

# What an earlier try for $key has left: $count units, and $there bytes of the file that was coming. Who sent it may
# hang in a frozen connection and write yet, so it keeps its own.
inherit() {
    set +f
    for left in .new/part.*."$key"; do
        set -f
        old=${left#.new/part.}
        pid=${old%%.*} old=${old#*.}
        [ -d "$left/tree" ] || continue
        if born "$pid" && [ "$born" = "${old%%.*}" ]; then
            mkdir -m 700 "$draft" && cp "$left/count" "$draft" && cp -R "$left/tree" "$draft" || remove "$draft"
        else
            mv -T "$left" "$draft"
        fi
        break
    done 2>/dev/null
    set -f
    there=0
    if [ -d "$tree" ]; then
        touch "$draft"
        { read -r count name <"$draft/count"; } 2>/dev/null
        decode "$name"
        [ ! -f "$tree/$decoded" ] || there=$(stat -c %s -- "$tree/$decoded")
        count=${count:-0}
    fi
    [ "$count $there" = '0 0' ] || return 0
    remove "$draft" # some of an archive may be there
    mkdir -m 700 "$draft" "$tree"
}

manifest() {
    bare=1 LC_ALL=C
    export LC_ALL
    { below .; } | sort | sha256sum | { read -r sum rest; echo "$sum"; }
}

remove() {
    rm -rf "$1" 2>/dev/null || { chmod -R u+rwX "$1"; rm -rf "$1"; } 2>/dev/null
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
    if [ "$limit" != ask ] && [ "$limit" != all ]; then
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
    {
        [ -z "$bare" ] || sums "$@"
    } | while read -r size <&3; do
        sum=
        [ -z "$bare" ] || { read -r sum rest && sum=" ${sum#\\}"; } || break
        mode=f
        [ ! -x "$1" ] || mode=x
        encode "$1"
        shift
        printf '%s %s%s %s\n' "$mode" "$size" "$sum" "$encoded"
    done 3<<EOF
$(stat -c %s -- "$@")
EOF
    [ -n "$bare" ] && return
    skip=0
    if [ "$limit" = ask ]; then
        echo ask
        read -r skip || exit 1
    else
        echo bytes
    fi
    rest_of "$skip" "$@" &
    found=$(sums "$@") # meanwhile
    wait $!
    while read -r sum rest; do
        echo "sum ${sum#\\}"
    done <<EOF
$found
EOF
}

rest_of() {
    skip=$1
    shift
    case $skip in
    0) cat -- "$@" ;;
    *) if [ $# = 1 ]; then tail -c "+$((skip + 1))" -- "$1"; else cat -- "$@" | tail -c "+$((skip + 1))"; fi ;;
    esac
}

# Lines that begin with the SHA-256 of each. OpenSSL, where it is there, needs a fraction of the time for large ones.
sums() {
    case $* in
    *"$N"*) ;;
    *) large "$@" && openssl_works && { openssl dgst -sha256 -r "$@"; return; } ;;
    esac
    sha256sum -- "$@"
}

large() {
    for size in $(stat -c %s -- "$@"); do
        [ "$size" -lt 8388608 ] || return 0
    done
    return 1
}

openssl_works() {
    case $(printf abc | openssl dgst -sha256 -r) in
    ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad\ *) ;;
    *) false ;;
    esac
} 2>/dev/null

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

some='' count=0 bare= limit= BLOCK=65536
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

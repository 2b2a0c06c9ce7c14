# What stays on the box: outputs under their content, in .cas/CONTENT/NAME as what is sent here, read-only.
#
#   sh keep.sh keep ROOT TOKEN OUTPUT NAME KIND   its entries as in tree.sh, without bytes, and `end`; or `missing`,
#                                                 `wrong WHAT`. Then from stdin `CONTENT`, and it is moved there by one
#                                                 rename: `ok`; or `changed`
#   sh keep.sh holds ROOT CONTENT…                `no CONTENT` of each that is not what was put there, `ok`
#   sh keep.sh check ROOT                         the same of all
#   sh keep.sh drop ROOT AGE CONTENT…             remove those not kept anew for AGE seconds: `gone CONTENT`, `ok`
#
# .kept/CONTENT says `SUM NAME`: a checksum of inodes, modes, sizes and times, which tells of any change and reads no
# file. TOKEN/kept/OUTPUT is there from before the rename: it says where the output went, should nobody be told.
# OUTPUT and NAME are %b-encoded, and in .kept.

. "${0%/*}/tree.sh"
LC_ALL=C
export LC_ALL

# Instead of tree.sh's: no bytes. A file with a second name could be changed by that name: `h`; `u` has set-user-id.
files() {
    sums "$@" | while read -r sum rest && read -r size links <&3; do
        mode=f
        [ ! -x "$1" ] || mode=x
        [ "$links" = 1 ] || mode=h
        [ ! -u "$1" ] && [ ! -g "$1" ] || mode=u
        encode "$1"
        shift
        printf '%s %s %s %s\n' "$mode" "$size" "${sum#\\}" "$encoded"
    done 3<<END
$(stat -c '%s %h' -- "$@")
END
}

# $sum of all that `ls -l` with $2 says of $1 and what is below it, less how many blocks that takes: they may come late.
look() {
    sum=$(ls "-lnibRA$2" --time-style=+%s.%N -- "$1" | while IFS= read -r line; do
        case $line in total\ *) ;; *) printf '%s\n' "$line" ;; esac
    done | sha256sum)
    sum=${sum%% *}
}

# Whether the content $1 is what was put there; $kept is its name.
holds() {
    { read -r was kept <"$root/.kept/$1"; } 2>/dev/null || return 1
    decode "$kept"
    kept=$decoded
    [ -e "$root/.cas/$1/$kept" ] && look "$root/.cas/$1/$kept" c && [ "$sum" = "$was" ]
} 2>/dev/null

remove() {
    rm -rf "$@" 2>/dev/null || { chmod -R u+rwX "$@"; rm -rf "$@"; } 2>/dev/null
}

keep() {
    token=$1 spoken=$2 name=$3 kind=$4
    decode "$spoken"
    output=$decoded
    decode "$name"
    file=$decoded
    mark=$root/$token/kept/$output place=$root/$token/out/$output moved=
    if [ ! -e "$place/$file" ] && [ ! -h "$place/$file" ] && { read -r moved <"$mark"; } 2>/dev/null; then
        place=$root/.cas/$moved
        [ ! -h "$place/$file" ] || ! holds "$moved" || file=$kept
    fi
    cd "$place" 2>/dev/null && { [ -e "./$file" ] || [ -h "./$file" ]; } || { echo missing; return; }
    found='neither a file nor a folder'
    [ ! -f "./$file" ] || found='a file'
    [ ! -d "./$file" ] || found='a folder'
    [ ! -h "./$file" ] || found='a symbolic link'
    [ "$found" = "a $kind" ] || { echo "wrong $found"; return; }
    [ -n "$moved" ] || chmod -R a-w,a+rX -- "./$file" 2>/dev/null || { echo "wrong not the daemon's user's"; return; }
    look "./$file" ''
    before=$sum
    entries "./$file"
    echo end
    read -r content && [ -n "$content" ] || return
    look "./$file" ''
    [ "$sum" = "$before" ] || { echo changed; return; }
    if [ -z "$moved" ]; then
        settle || return
    elif [ "$moved" != "$content" ]; then
        echo changed
        return
    fi
    holds "$content" || noted "$file" || return
    touch "$root/.kept/$content"
    sync -f "$root/.kept/$content" "$root/.cas/$content" 2>/dev/null || sync
    echo ok
}

# ./$file into its place, or, when the same is there already, one more name for that.
settle() {
    mkdir -p "$root/$token/kept" "$root/.kept" "$root/.cas" || return
    printf '%s\n' "$content" >"$mark.new" && mv -T "$mark.new" "$mark" || return
    there=$root/.cas/$content
    if holds "$content"; then
        [ -e "$there/$file" ] || ln -sn "$kept" "$there/$file" || return
        remove "./$file"
        return
    fi
    remove "$root/.kept/$content" "$there" # what is there is not what it was
    chmod u+w "./$file" # a folder that is moved is written to
    mkdir "$there" && mv -T "./$file" "$there/$file"
}

noted() {
    there=$root/.cas/$content/$1
    chmod a-w "$there"
    look "$there" c
    encode_b "$1"
    printf '%s %s\n' "$sum" "$encoded" >"$root/.kept/.$content" && mv -T "$root/.kept/.$content" "$root/.kept/$content"
}

# For `decode`.
encode_b() {
    encoded=
    for word in $(printf '%s' "$1" | od -An -v -to1); do encoded="$encoded\\0$word"; done
}

check() {
    for content in "$@"; do
        holds "$content" || echo "no $content"
    done
    echo ok
}

drop() {
    age=$1
    shift
    for content in "$@"; do
        since=$(stat -c %Y ".kept/$content" 2>/dev/null) || since=$(stat -c %Y ".cas/$content" 2>/dev/null) || continue
        [ $(($(date +%s) - since)) -ge "$age" ] || continue
        rm -f ".kept/$content"
        remove ".cas/$content"
        echo "gone $content"
    done
    echo ok
}

cd "$1" || exit 1
root=$PWD
shift
case $mode in
keep | drop) "$mode" "$@" ;;
holds) check "$@" ;;
check)
    set --
    for content in $(ls -U .kept 2>/dev/null); do
        set -- "$@" "$content"
    done
    check "$@"
    ;;
esac

# What was sent here and what was built here goes again: what nobody has used for long, and beyond a size what was used
# least recently. Not what a job uses that has not ended, and not what is kept here (keep.sh).
#
#   sh prune.sh ROOT SECONDS KIB go|look    from stdin names that stay, in one line; then `gone NAME KIB` of each, and `ok`
#
# A job names what it uses in its claim (second line of `who`), and only then looks whether that is there, unless somebody
# is in .pruning: then it waits. Who prunes goes in there before he reads the claims, so what a job has found stays.
# .used/NAME is as old as the last use. A job of a cluster that this box is the login node of names it in slurm/uses/JOB.

. "${0%/*}/step.sh"
LC_ALL=C
export LC_ALL
cd "$1" || exit 1
unused=$2 limit=$3 mode=$4
boot_id
born $$
mine=$$.$born

# `NAME 0 KIB`
sizes() {
    du -k -d 1 .cas .envs 2>/dev/null | while read -r size path; do
        case $path in
        .cas/b3-* | .cas/b3t-* | .cas/code-* | .cas/sdk-*) echo "${path##*/} 0 $size" ;;
        .envs/*.*) ;;
        .envs/*) echo "${path##*/} 0 $size" ;;
        esac
    done
}

# `NAME 1 SECONDS`
stamps() {
    ls -lnU --time-style=+%s .cas .envs .used 2>/dev/null | while read -r bits links user group size time name; do
        [ -z "$name" ] || echo "$name 1 $time"
    done
}

# `NAME 2`; fails when there is a job of which nobody knows. A claim moves from .new to its token: in this order.
users() {
    for kind in '.new/slot.*' '.new/job.*' '[!.]*'; do
        set +f
        for T in $kind; do
            set -f
            uses=
            [ ! -e "$T/exit.json" ] && { read -r who && { read -r uses || [ "$kind" != '[!.]*' ] || who="old $who"; }; } \
                <"$T/claim/who" || continue
            case $who in
            "old fenced") continue ;;
            old\ *) who=${who#old } && alive && return 1 ;;
            *) alive || continue ;;
            esac
            for name in $uses; do echo "$name 2"; done
        done
        set -f
    done
    set +f
    for list in slurm/uses/*; do
        [ -e "jobs/${list##*/}/exit.json" ] || while read -r name; do echo "$name 2"; done <"$list"
    done
    for lock in .envs/*.lock; do
        name=${lock##*/}
        echo "${name%.lock} 2"
    done
    set -f
} 2>/dev/null

# Lines of one name into one: `SECONDS KIB NAME USED`
merged() {
    name=
    while read -r next what fact; do
        if [ "$next" != "$name" ]; then
            [ -z "$name" ] || [ -z "$size" ] || echo "$time $size $name $used"
            name=$next size='' time=0 used=''
        fi
        case $what in
        0) size=$fact ;;
        1) [ "$fact" -le "$time" ] || time=$fact ;;
        2) used=1 ;;
        esac
    done
    [ -z "$name" ] || [ -z "$size" ] || echo "$time $size $name $used"
}

# `NAME KIB` of what goes, the least recently used first.
chosen() {
    while read -r time size name used; do
        [ $((now - time)) -gt "$unused" ] || [ "$total" -gt "$limit" ] || break
        [ -z "$used" ] || continue
        total=$((total - size))
        echo "$name $size"
    done
}

place() {
    case $name in
    *-*) place=.cas/$name ;;
    *) place=.envs/$name ;;
    esac
}

read -r stay
leftovers
set +f
for left in .pruning/*; do
    by=${left#.pruning/}
    born "${by%.*}" && [ "$born" = "${by#*.}" ] || rm -f "$left"
done
set -f
found=$(sizes)
total=0
while read -r name what size; do
    total=$((total + ${size:-0}))
done <<END
$found
END
now=$(date +%s)
gone=.new/gone.$mine
mkdir -m 700 "$gone" || exit 1
trap 'rm -f ".pruning/$mine"' EXIT
trap 'exit 1' HUP INT TERM PIPE
true >".pruning/$mine" || exit 1
used=$(users) || used='*'
going=
[ "$used" = '*' ] || going=$({
    printf '%s\n%s\n' "$found" "$used"
    for name in $stay; do echo "$name 2"; done
    stamps
} | sort | merged | sort -n | chosen)
if [ "$mode" = go ]; then
    while read -r name size; do
        [ -n "$name" ] || continue
        place
        mv -T "$place" "$gone/$name" 2>/dev/null
    done <<END
$going
END
fi
rm -f ".pruning/$mine" # nobody has to wait for the rest
while read -r name size; do
    [ -n "$name" ] || continue
    place
    [ "$mode" = look ] || { [ ! -e "$place" ] && rm -f ".used/$name" ".envs/$name.log"; } || continue
    echo "gone $name $size"
done <<END
$going
END
rm -rf "$gone" 2>/dev/null || { chmod -R u+rwX "$gone"; rm -rf "$gone"; } 2>/dev/null
echo ok

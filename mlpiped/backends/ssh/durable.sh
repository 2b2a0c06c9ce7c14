# What outlives a power cut: a rename may have reached the disk, and the bytes not. So what was sent here or built here
# counts in the boot in which it came, and later only if it was synced since. The sticky bit of its folder says that: it
# goes where the folder goes. The first agent of a boot removes what has none, before it lists anything.
#
# Files that other machines have too (a network's, or a cluster's that is reached by its login node) may be lost without
# a boot of this one. There .boot/steady says so: everything is synced before it gets its name, and stays.

# Nobody waits for it. In the folder itself: what may have its name meanwhile is another's to mark.
lasts() {
    (cd "$1" && sync -f . && chmod +t .) </dev/null >/dev/null 2>&1 &
}

# Before $2 gets its name below the work folder $1.
steady() {
    [ ! -e "$1/.boot/steady" ] || sync -f "$2" 2>/dev/null || sync
}

# Whether no other machine writes the files here: ext4, xfs, btrfs, f2fs, zfs, bcachefs, tmpfs, ramfs, overlay.
ours() {
    case $(stat -f -c %t . 2>/dev/null) in
    ef53 | 58465342 | 9123683e | f2f52010 | 2fc12fc1 | ca451a4e | 1021994 | 858458f6 | 794c7630) ;;
    *) false ;;
    esac
}

# Fails where it cannot be removed. Where a job of this boot lives, somebody has done so.
renew() {
    [ ! -e ".boot/$boot" ] || return 0
    gone=.new/gone.$$.$mine
    mkdir -m 700 "$gone" 2>/dev/null
    set +f
    inhabited [!.]* || spoilt || { set -f; return 1; }
    for path in .boot/*; do
        [ "$path" = .boot/steady ] || rm -f "$path"
    done
    set -f
    true >".boot/$boot"
    (rm -rf "$gone" || { chmod -R u+rwX "$gone"; rm -rf "$gone"; }) </dev/null >/dev/null 2>&1 &
}

inhabited() {
    for T in "$@"; do
        claimed && alive && return 0
    done
    return 1
}

spoilt() {
    set --
    for path in .cas/* .envs/* [!.]*/in; do
        case $path in
        .cas/s2-* | .cas/s2t-*) continue ;; # keep.sh syncs
        .cas/* | .envs/*) [ -d "$path" ] && [ ! -k "$path" ] || continue ;;
        *) path=${path%/in} && [ -d "$path/in" ] && [ ! -e "$path/claim" ] || continue ;; # it was to be launched
        esac
        set -- "$@" "$path"
        [ $# -lt 200 ] || { away "$@" || return; set --; }
    done
    away "$@"
}

away() {
    [ $# -gt 0 ] && [ ! -e ".boot/$boot" ] || return 0 # another agent was sooner
    mv -- "$@" "$gone" || rm -rf -- "$@" || { chmod -R u+rwX -- "$@"; rm -rf -- "$@"; }
    for path in "$@"; do
        [ ! -e "$path" ] || return 1
    done
} 2>/dev/null

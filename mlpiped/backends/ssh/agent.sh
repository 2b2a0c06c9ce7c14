# What the daemon talks to on this box: a line is a request, the answers are lines too, each with the request's number.
#
#   sh agent.sh ROOT PYTHON steady|-    in a channel of its own; it ends with the channel, steps do not. `steady`: what
#                                       lies here is used whether this machine is up or not
#
#   N launch TOKEN ORDER       r N handle JSON | fenced | missing | failed TEXT
#   N launchfile TOKEN SIZE    the same, with SIZE bytes of order behind the line
#   N find TOKEN…              f TOKEN JSON …, r N ok
#   N fence TOKEN              r N fenced | handle JSON | failed
#   N look TOKEN…              e TOKEN FLAGS JSON (ended) | n TOKEN (fenced) | l TOKEN WHY (lost) …, r N ok
#   N cancel TOKEN             r N ok
#   N discard all|work TOKEN…  r N ok | failed
#   N alias CONTENT NAME       r N ok | missing; NAME is %b-encoded
#   N health                   d FREE-KIB, r N ok
#   N beat                     r N ok
#
# Without a request for two minutes it ends: the connection is frozen then, and the daemon has another one.

bin=${0%/*}
root=$1 python=$2
. "$bin/step.sh"
. "$bin/durable.sh"
cd "$root" || exit 70
boot_id
born $$
mine=$born
pulse=0 floor=0 slot_n=0 slots_made=0 slots=.new/slot.$$.$mine.
events=$root/.events/$$.$mine beats=$root/.new/beat.$$.$mine
read -r up rest </proc/uptime
btime=$(($(date +%s) - ${up%.*}))
setsid=$(command -v setsid)
undo=0 apart=0 leader=$setsid
while read -r key ignored; do
    [ "$key" = SigIgn: ] && break
done </proc/self/status
case $ignored in
*[0189]) undo=2 ;; # neither SIGINT nor SIGQUIT
*) env --default-signal=INT,QUIT true 2>/dev/null && undo=1 leader="$(command -v env) --default-signal=INT,QUIT $setsid" ;;
esac

[ -n "$setsid" ] && "$setsid" -f true 2>/dev/null && apart=1

# In one piece: supervisors write to the same channel, by the FIFO.
put_line() {
    printf '%s' "$1$N"
}

# Reads what agents that are gone have left unread (a supervisor may wait in there), and removes their drafts.
sweep() {
    set +f
    for fifo in .events/*; do
        set -f
        old=${fifo#.events/}
        born "${old%%.*}" && [ "$born" = "${old#*.}" ] && continue
        if [ -p "$fifo" ]; then
            dd if="$fifo" iflag=nonblock of=/dev/null 2>/dev/null
        fi
        rm -f "$fifo"
    done
    set -f
    leftovers
}

# A shell ignores SIGINT and SIGQUIT in what it runs in the background, which `env` can undo. So the job is not run there:
# it kills the one who would wait for it. Where it must be, twice in the background, so that nobody has to wait.
launch() {
    order=$2 slot=
    [ "$slot_n" = "$slots_made" ] || slot_n=$((slot_n + 1)) slot=$slots$slot_n
    if [ "$undo" = 2 ]; then
        {
            (
                read -r between rest </proc/self/stat
                (run "$1" "$id" "$events" "$slot" </dev/null >/dev/null 2>&1)
                :
            )
        } 2>/dev/null
        true
    elif [ "$undo" = 1 ] || [ "$apart" = 0 ]; then
        (run "$1" "$id" "$events" "$slot" </dev/null >/dev/null 2>&1 &)
    else
        MLPIPED_ORDER=$2 MLPIPED_LEADER=$setsid \
            "$setsid" -f sh "$bin/step.sh" run "$root" "$1" "$id" "$events" "$btime" "$slot" </dev/null >/dev/null 2>&1
    fi || put_line "r $id failed no process can be started on the box"
    [ "$slot_n" != "$slots_made" ] || make_slots
}

# Folders for the next jobs, several at a time: while the one before runs, and for the price of one.
make_slots() {
    set --
    slots_made=$((slots_made + 8))
    next=$slot_n
    while [ "$next" -lt "$slots_made" ]; do
        next=$((next + 1))
        set -- "$@" "$slots$next/claim" "$slots$next/work"
    done
    umask 077
    mkdir -p "$@" 2>/dev/null
    umask "$mask"
}

seek() {
    for T in "$@"; do
        claimed && [ "$who" != fenced ] && record && put_line "f $T $record"
    done
}

fence() {
    T=$1 who=fenced pulse=$((pulse + 1))
    draft=.new/fence.$$.$mine.$pulse
    umask 077
    mkdir -p "$draft" "$T" && fill "$draft" && mv -T "$draft" "$T/claim" 2>/dev/null
    umask "$mask"
    claimed || { put_line "r $id failed its folder cannot be made on the box: is a disk full?"; return; }
    [ ! -e "$draft" ] || rm -rf "$draft"
    record
    case $who in
    fenced) put_line "r $id fenced" ;;
    *) put_line "r $id handle $record" ;;
    esac
}

# Whether the dead supervisor of $T has not begun the step, and nothing that it left can: see `begin`.
unbegun() {
    [ ! -e "$T/claim/pid" ] && true >"$T/claim/cancelled" && [ ! -e "$T/claim/pid" ]
} 2>/dev/null

# Liveness first, the witness after it: the other order calls a step lost that ended in between.
look() {
    for T in "$@"; do
        claimed
        there=$?
        [ "$there" = 0 ] && alive
        lives=$?
        if { IFS= read -r end <"$T/exit.json"; } 2>/dev/null; then
            away=-
            case $who in *" $boot "*) ;; *) away=rebooted ;; esac
            flags
            put_line "e $T $flags$away ${end%"${end##*[! ]}"}"
        elif [ "$there" != 0 ]; then
            put_line "l $T gone"
        elif [ "$who" = fenced ]; then
            put_line "n $T"
        elif [ "$lives" != 0 ]; then
            why=killed
            case $who in *" $boot "*) unbegun && why=unbegun ;; *) why=rebooted ;; esac
            bury || why=stuck
            put_line "l $T $why"
        fi
    done
}

discard() {
    what=$1 done=ok
    shift
    for T in "$@"; do
        set -- "$T"
        [ "$what" = all ] || set -- "$T/work" "$T/scratch" "$T/out" "$T/in" "$T/stdout" "$T/stderr"
        rm -rf "$@" 2>/dev/null || { chmod -R u+rwx "$@"; rm -rf "$@"; } 2>/dev/null || done=failed
    done
    put_line "r $id $done"
}

# A content under one more name.
alias_of() {
    name=$(printf '%b' "$2"; echo .)
    name=.cas/$1/${name%.}
    set +f
    set -- ".cas/$1"/*
    set -f
    if [ -e "$name" ] || { [ -e "$1" ] && ln -sn "${1##*/}" "$name" 2>/dev/null; } || [ -e "$name" ]; then
        put_line "r $id ok"
    else
        put_line "r $id missing"
    fi
}

health() {
    df -Pk . | { read -r head; read -r device blocks used free rest; put_line "d $free"; put_line "r $id ok"; }
}

sweep
if [ "$3" = steady ] || ! ours; then
    true >.boot/steady || exit 70
elif ! renew; then
    put_line "x what came before the box last started cannot be removed: $root/.cas"
    exit 70
fi
mkfifo -m 600 "$events" || exit 70
echo 0 >"$beats" 2>/dev/null
cat <>"$events" &
reader=$!
(
    last=
    trap 'kill $!; exit' TERM # before there is a sleep, that is the reader
    while sleep 120 & do
        wait $! || exit
        born $$ && [ "$born" = "$mine" ] && read -r beat <"$beats" || exit
        [ "$beat" != "$last" ] || { kill $$; exit; }
        last=$beat
    done
) </dev/null >/dev/null 2>&1 &
watch=$!
trap 'rm -f "$events" "$beats"; kill $reader $watch 2>/dev/null' EXIT
trap 'exit 0' HUP INT TERM PIPE

shim=$root/.python
found=$(command -v "$python")
wanted="#!/bin/sh${N}exec \"$found\" \"\$@\""
if [ -n "$found" ] && [ "$(cat "$shim/python" 2>/dev/null)" != "$wanted" ]; then
    mkdir -p "$shim"
    printf '%s\n' "$wanted" >"$shim/python.$$"
    chmod 700 "$shim/python.$$"
    mv -T "$shim/python.$$" "$shim/python"
fi
put_line "h root $root"
put_line "h boot $boot"
put_line "h python $found"
put_line "h tar $(command -v tar)"
ls -U .cas 2>/dev/null | head -n 20000 | while IFS= read -r name; do
    put_line "c $name"
done
put_line "h ready"

make_slots
beat=0
while IFS= read -r line; do
    beat=$((beat + 1))
    echo $beat >"$beats" 2>/dev/null
    id=${line%% *} line=${line#* }
    verb=${line%% *} rest=${line#* }
    case $verb in
    launch) launch "${rest%% *}" "${rest#* }" ;;
    launchfile)
        draft=.new/order.$$.$mine.$id
        (umask 077; dd bs="${rest#* }" count=1 iflag=fullblock of="$draft" 2>/dev/null) || : >"$draft"
        launch "${rest%% *}" "@$draft"
        ;;
    find) seek $rest; put_line "r $id ok" ;;
    fence) fence $rest ;;
    look) look $rest; put_line "r $id ok" ;;
    cancel)
        (end "$rest" cancelled </dev/null >/dev/null 2>&1 &)
        put_line "r $id ok"
        ;;
    discard) (discard $rest) & ;;
    alias) alias_of $rest ;;
    health) health ;;
    beat) put_line "r $id ok" ;;
    *) put_line "r $id failed no such request" ;;
    esac
done

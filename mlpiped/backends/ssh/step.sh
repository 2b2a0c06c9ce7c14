# One attempt on this box, from claim to witness (the job folder's format: base.py). Needs sh, coreutils and /proc.
#
# `run` and `end` are for processes of their own, which agent.sh forks; nothing here waits for a connection or needs one.
# agent.sh and tree.sh use the rest. Where the shell cannot undo what `&` does to signals, agent.sh starts it anew:
#
#   setsid -f sh step.sh run ROOT TOKEN REQUEST EVENTS BTIME DRAFT    with the order in $MLPIPED_ORDER

set -f
N='
'
mask=$(umask)
uses= between=

# --- who is who: a pid alone is no name

boot_id() {
    read -r boot <"${MLPIPED_LAB_BOOT_ID:-/proc/sys/kernel/random/boot_id}"
}

# $born: when process $1 began (`self`: this one), in clock ticks since the boot; $number is its pid. Fails when it has
# ended. A shell reads byte by byte, each a system call: nothing is read twice here, or farther than it is needed.
born() {
    born=
    { read -r stat <"/proc/${1:-none}/stat"; } 2>/dev/null || return 1
    number=${stat%% *}
    stat=${stat##*) }
    set -- $stat
    [ "$1" != Z ] && [ "$1" != X ] || return 1
    shift 19
    born=$1
}

# Whether the claim of $T is there; $who is `pid start boot grace`, or `fenced`. The second line is for prune.sh.
claimed() {
    for look in first second; do # a claim may appear after the first: it is complete then
        { read -r who <"$T/claim/who"; } 2>/dev/null && return 0
        who='0 0 -' # what a power cut left: somebody began, and is gone
        [ -e "$T/claim" ] || return 1
    done
}

# Whether the supervisor that claimed $T lives. $who is read.
alive() {
    set -- $who
    [ "$3" = "$boot" ] && born "$1" && [ "$born" = "$2" ]
}

# The claim as JSON, from $who.
record() {
    set -- $who
    [ "$1" = fenced ] && record='{"v": 1, "fenced": true}' && return
    [ "$3" = - ] && set -- "$1" "$2" ''
    record="{\"v\": 1, \"pid\": $1, \"start\": $2, \"boot\": \"$3\"}"
}

# What a claim by $who consists of, into the folder $1.
fill() {
    record
    printf '%s\n' "$record" >"$1/handle.json" &&
        printf '%s\n%s\n' "$who" "$uses" >"$1/who" &&
        printf '%2048s' '' >"$1/exit.json" && # the space that the end will need
        printf '%1024s' '' >"$1/said"
} 2>/dev/null

# Removes drafts of processes that are gone: .new/KIND.PID.START… What such a process started may be at it for a while.
leftovers() {
    set +f
    for left in .new/*; do
        set -f
        [ -e "$left" ] || continue
        old=${left#.new/*.}
        pid=${old%%.*} old=${old#*.}
        born "$pid" && [ "$born" = "${old%%.*}" ] && continue
        most=3600
        case $left in .new/part.*) most=86400 ;; esac # of these the next try goes on
        age=$(stat -c %Y "$left" 2>/dev/null) && [ $(($(date +%s) - age)) -gt $most ] || continue
        rm -rf "$left" 2>/dev/null || { chmod -R u+rwX "$left"; rm -rf "$left"; } 2>/dev/null
    done
    set -f
}

# --- the processes of a step: its group, and all that has the mark in its environment or works in its folder

# $strays: the processes above $floor that bear the mark of $T.
strays() {
    strays= young= count=0
    near || {
        young= count=0
        set +f
        for folder in /proc/[0-9]*; do
            [ "${folder#/proc/}" -gt "$floor" ] && young="$young $folder/environ" count=$((count + 1))
        done
        set -f
    }
    for folder in $young; do
        pid=${folder%/environ}
        [ "$pid/cwd" -ef "$root/$T/work" ] && bare_of "$folder" && strays="$strays ${pid#/proc/}"
    done
    if [ $count -gt 3 ]; then # a shell reads a byte at a time: many are for grep, where there is one
        few=$(grep -lzsF -- "MLPIPED_JOB_DIR=$root/$T/" $young)
        [ $? = 127 ] || young=$few
    fi
    for folder in $young; do
        pid=${folder%/environ}
        marked "$folder" && strays="$strays ${pid#/proc/}"
    done
}

# Where few have begun since $floor, each is looked for by its number, until no new one has come.
near() {
    [ "$floor" -gt 0 ] || return 1
    pid=$floor
    while read -r load1 load5 load15 tasks last </proc/loadavg && [ "$last" != "$pid" ]; do
        [ $((last - floor)) -lt 64 ] && [ "$last" -gt "$pid" ] || return 1
        while [ "$pid" -lt "$last" ]; do
            pid=$((pid + 1))
            [ -e "/proc/$pid/environ" ] && young="$young /proc/$pid/environ" count=$((count + 1))
        done
    done
    return 0
}

# Whether nothing of an environment is left: who gives himself another title writes it over his own. A person who looks
# at the folder has one.
bare_of() {
    while IFS= read -r text || [ -n "$text" ]; do
        case $text in *PATH=* | *HOME=*) return 1 ;; esac
    done <"$1"
    return 0
} 2>/dev/null

marked() {
    while IFS= read -r text || [ -n "$text" ]; do
        case $text in *"MLPIPED_JOB_DIR=$root/$T/"*) return 0 ;; esac
    done <"$1"
    return 1
} 2>/dev/null

# Signal $1 to everything of $T.
strike() {
    strays
    for pid in $strays; do
        kill -s "$1" "$pid"
    done
    read -r first start <"$T/claim/pid" && born "$first" && [ "$born" = "$start" ] || return 0
    kill -s "$1" -- "-$first" || kill -s "$1" "$first"
} 2>/dev/null

# SIGKILL until nothing is left of $T; 1 when some survive it, in the kernel.
bury() {
    tries=0
    while kill -s KILL -- "-${1:-x}" 2>/dev/null || { strays; [ -n "$strays" ]; }; do
        for pid in $strays; do
            kill -s KILL "$pid" 2>/dev/null
        done
        tries=$((tries + 1))
        [ "$tries" -gt 1 ] && sleep 0.05
        [ "$tries" -lt 600 ] || return 1
    done
}

# --- from claim to witness

# $now: seconds since the epoch, on a clock that nobody sets.
clock() {
    read -r up rest </proc/uptime
    now=$((btime + ${up%.*})).${up#*.}
}

# A line to an agent, in one piece; to nobody when it has gone.
say() {
    [ -p "$1" ] && printf '%s' "$2$N" 1<>"$1"
} 2>/dev/null

# What a claim that is there already means for the request.
answer() {
    record
    case $who in
    fenced) say "$events" "r $request fenced" ;;
    *) say "$events" "r $request handle $record" ;;
    esac
}

refuse() {
    say "$events" "r $request failed $1"
    leave 70
}

# The environment that a step starts from: the box's, less what is only of the connection or of other programs.
bare() {
    unset SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_ORIGINAL_COMMAND SSH_AUTH_SOCK MLPIPED_LAB_BOOT_ID OLDPWD \
        PYTHONHASHSEED PYTHONHOME PYTHONSTARTUP
    export PATH="${PATH:-/usr/local/bin:/usr/bin:/bin}"
}

# The step's process, up to its `exec`; its variables come after this, for they may have any name.
begin() {
    cd "$root/$T/work" || exit 126
    found "$1" || exit 127
    born self
    self=$number
    echo 500 >/proc/self/oom_score_adj 2>/dev/null
    printf '%s %s\n' "$self" "$born" >"$root/$T/claim/pid" || exit 126
    [ ! -e "$root/$T/claim/cancelled" ] || kill -s KILL "$self"
}

# Whether $1 can be executed; else why not, into `error`.
found() {
    case $1 in
    */*) set -- "$1" "$1" ;;
    *)
        IFS=:
        for place in $PATH; do
            [ -x "${place:-.}/$1" ] && [ ! -d "${place:-.}/$1" ] && set -- "$1" "${place:-.}/$1" && break
        done
        unset IFS
        ;;
    esac
    why="\"command not found: $shown\""
    if [ -e "${2-}" ]; then
        why="\"permission denied: $shown is not an executable file\""
        [ -x "$2" ] && [ ! -d "$2" ] && return
    fi
    printf '%s' "$why" >"$root/$T/claim/error"
    return 1
}

# Milliseconds of `0m0.012000s 0m0.034000s`, user and system.
millis() {
    millis=0
    for text in $1; do
        rest=${text#*m}
        rest=${rest%s}
        tail=${rest#*[.,]}000
        tail=1${tail%"${tail#???}"}
        millis=$((millis + ${text%%m*} * 60000 + ${rest%[.,]*} * 1000 + tail - 1000))
    done
}

# $status, $millis, and $said: what the shell says of a process that was killed. In space that is there already, and in
# no substitution, where bash says nothing.
execute() {
    {
        (bare; step) </dev/null >>"$T/stdout" 2>>"$T/stderr"
        status=$?
        times
    } 1<>"$T/claim/said" 2>&1
    said= used=
    while IFS= read -r text; do
        case $text in
        *m*s\ *m*s) # the second one is of what has been waited for
            [ -z "$used" ] || { used=$text; break; }
            used=$text
            ;;
        *) said=$said$text ;;
        esac
    done <"$T/claim/said"
    millis "$used"
}

# The end of the step as the contents of exit.json, into $end.
judge() {
    code=$status signal=null error=null timed_out=false cancelled=false
    [ ! -e "$T/claim/timed_out" ] || timed_out=true
    [ ! -e "$T/claim/cancelled" ] || timed_out=false cancelled=true
    # A shell says in words that a process was killed; bash does not for SIGTERM, which is then ours.
    if [ "$status" -gt 128 ] && { [ -n "$said" ] || [ $timed_out$cancelled != falsefalse ]; }; then
        code=null signal=$((status - 128))
    fi
    { IFS= read -r error || [ -n "$error" ] || error=null; } 2>/dev/null <"$T/claim/error"
    if [ "$error" != null ]; then
        code=null
    elif [ ! -e "$T/claim/pid" ]; then
        code=null signal=null error='"the step could not be started on its box: is a disk full?"'
    elif [ "$stuck" = 1 ]; then
        error='"some of its processes survive SIGKILL: they hang in the kernel"'
    fi
    cpu=$((1000 + millis % 1000)) # no substitution: a fork is dear here
    cpu=$((millis / 1000)).${cpu#1}
    end="{\"v\": 1, \"code\": $code, \"signal\": $signal, \"timed_out\": $timed_out, \"cancelled\": $cancelled,"
    end="$end \"error\": $error, \"started\": $began, \"ended\": $now, \"cpu\": $cpu, \"max_rss\": null}"
}

# $flags: which of its files hold anything.
flags() {
    flags=-
    for name in stdout stderr metrics.jsonl; do
        [ -s "$T/$name" ] && flags=$flags$name-
    done
}

# Make durable what a successful step has made: a witness that outlives a power cut must not vouch for bytes that do not.
settle() {
    made=$1
    set +f
    set -- "$1"/* "$1"/.[!.]* "$1"/..?*
    set -f
    if [ $# -gt 1000 ]; then # a command takes so many words only
        sync -f "$made" 2>/dev/null || sync
        return
    fi
    sync -- "$@" 2>/dev/null
    for path in "$@"; do
        [ -d "$path" ] && [ ! -h "$path" ] && (settle "$path")
    done
}

# The job's folder with all that it needs, as $draft; $1… are folders in it. A full disk costs no attempt.
build() {
    umask 077
    [ -d "$draft/claim" ] || mkdir -p "$draft/claim" "$draft/work" || return
    for name in "$@"; do
        shift
        set -- "$@" "$draft/$name"
    done
    [ $# = 0 ] || mkdir -p "$@" || return
    umask "$mask"
    fill "$draft/claim" || return # says what it uses before it looks for it
    present || { lacks=1; return 1; }
    if [ -n "$code" ]; then
        cp -R "$code/." "$draft/work" && chmod -R u+rwX "$draft/work" || return
    fi
    [ -z "$params" ] || printf '%s' "$params" >"$draft/params.json"
} 2>/dev/null

# Whether all that the job needs is there, to stay. While somebody prunes, that is not known.
present() {
    for name in $uses; do
        true >".used/$name" # unlike `:` it may fail
    done
    set +f
    for path in .pruning/*; do
        set -f
        tries=0
        while [ -e "$path" ] && [ "$tries" -lt 1000 ]; do
            by=${path#.pruning/}
            born "${by%.*}" && [ "$born" = "${by#*.}" ] || break
            tries=$((tries + 1))
            sleep 0.02
        done
    done
    set -f
    needs
}

# One rename onto what is not there, or onto a folder that is not empty: one wins, and its claim is complete then.
publish() {
    mv -T "$draft" "$T" && return
    [ ! -e "$T/claim" ] && mv -T "$draft/claim" "$T/claim" || return # its inputs are there already
    set +f
    mv -- "$draft"/* "$T"
    set -f
    rmdir "$draft"
} 2>/dev/null

# `ln` is there sooner than `mv`, and not every file system has it.
testify() {
    ln "$T/claim/exit.json" "$T/exit.json" || mv -T "$T/claim/exit.json" "$T/exit.json"
} 2>/dev/null

leave() {
    rm -rf "$draft"
    exit "$1"
}

# In $root, with $order: the variables of `orders.py`, and the function `step`. $order is `@FILE` when it is long.
# $4 is a folder in which `claim` and `work` are made already, or none.
run() {
    T=$1 request=$2 events=$3 floor=0 lacks=
    born self
    self=$number
    [ -z "$between" ] || [ "$between" = "$self" ] || kill -s KILL "$between"
    draft=${4:-.new/job.$self.$born}
    case $order in
    @*)
        long=${order#@}
        order=$(cat "$long")
        rm -f "$long"
        ;;
    esac
    claimed && answer && leave 75
    eval "$order"
    who="$self $born $boot $grace"
    if ! build "$@"; then
        [ -z "$lacks" ] || { say "$events" "r $request missing"; leave 70; }
        refuse "its folder cannot be made on the box: is a disk full?"
    fi
    if ! publish; then
        claimed || refuse "its folder cannot be made on the box: is a disk full?"
        answer
        leave 75
    fi
    answer &
    if [ -n "$timeout" ]; then
        (
            trap 'kill $!; exit' TERM
            sleep "$timeout" &
            wait $!
            end "$T" timed_out
        ) </dev/null >/dev/null 2>&1 &
        watch=$!
    fi
    clock
    began=$now
    execute
    clock
    { read -r first start <"$T/claim/pid"; } 2>/dev/null || first=
    read -r load1 load5 load15 tasks last </proc/loadavg
    # What is younger than this process has a higher pid, unless the numbers came round.
    [ "$last" -gt "$self" ] && [ $((${now%.*} - ${began%.*})) -lt 2 ] && floor=$self
    stuck=0
    bury "$first" || stuck=1
    judge
    [ "$code" != 0 ] || [ ! -d "$T/out" ] || settle "$T/out"
    printf '%-2047s\n' "$end" 1<>"$T/claim/exit.json" && testify || exit 71
    [ -z "$timeout" ] || kill "$watch" 2>/dev/null
    flags
    set +f
    set -- .events/*
    for events in "$@"; do # one that nobody reads any more may be full
        if [ $# = 1 ]; then say "$events" "e $T $flags $end"; else say "$events" "e $T $flags $end" & fi
    done
    return 0
}

# SIGTERM to everything of the step, SIGKILL after its grace. $2 says why.
end() {
    T=$1 floor=0
    [ ! -e "$T/exit.json" ] || exit 0
    claimed && alive || exit 0
    : >"$T/claim/$2"
    strike TERM
    grace=${who##* }
    read -r up rest </proc/uptime
    until=$((${up%.*} * 100 + 1${up#*.} - 100 + grace))
    pause=0.02
    while [ ! -e "$T/exit.json" ] && [ -e "$T/claim/exit.json" ]; do
        read -r up rest </proc/uptime
        if [ $((${up%.*} * 100 + 1${up#*.} - 100)) -ge "$until" ]; then
            strike KILL
            pause=0.2
        fi
        sleep $pause
    done
}

if [ "${1-}" = run ]; then
    cd "$2" || exit 70
    root=$2 btime=$6 order=$MLPIPED_ORDER leader=$MLPIPED_LEADER
    unset MLPIPED_ORDER MLPIPED_LEADER
    boot_id
    run "$3" "$4" "$5" "${7-}"
fi

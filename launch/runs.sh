# Sourced by study.sh and scenes_study.sh: runs of several settings and seeds, JOBS at a time, each finished
# once. SHARDS: the folder with train and val; OUT: of the runs; ONLY: the settings that are wanted, or nothing.
# Needs checks.sh.

expect_names() { # NAME WORD ...: each begins a line of standard input
    local known word
    known=$(awk 'NF {print $1}')
    for word in "${@:2}"; do
        grep -qxF -e "$word" <<<"$known" || refuse "$1 has '$word', expected words of: $(xargs <<<"$known")"
    done
}
expect_plain() { # NAME PATH: it is written into lines of commands
    [[ "$2" != *[[:space:]\'\"\\]* ]] || refuse "$1 is '$2', expected a path without blanks, quotes and backslashes"
}
expect_study() { # WORDS: what $OUT is for; runs are told by their names alone
    local found
    mkdir -p "$OUT"
    [ -e "$OUT/study" ] || echo "$1" >"$OUT/study"
    found=$(<"$OUT/study")
    [ "$found" = "$1" ] || refuse "OUT '$OUT' is a study with $found, now $1; give another OUT"
}
logged() { # NAME LOG COMMAND ...: run a command; if it fails, show the end of its log, which goes on at another start
    "${@:3}" >>"$2" 2>&1 || { echo "$1 failed:" >&2; tail -5 "$2" >&2; return 1; }
}
train_alone() { # NAME SEED RECIPE [key=value ...]: in one process; a finished run is not repeated
    local run="$OUT/$1-seed$2"
    [ ! -e "$run/finished" ] || return 0
    mkdir -p "$run"
    logged "$run" "$run.log" dmae-ds train "$3" --resume auto "run.dir=$run" "run.seed=$2" \
        "data.train=$SHARDS/train" "data.val=$SHARDS/val" "${@:4}" || return 1
    touch "$run/finished"
    echo "trained $run"
}
export -f logged train_alone
export OUT SHARDS

in_parallel() { # lines of arguments of `train_alone` on standard input
    xargs -P "$JOBS" -d '\n' -I '{}' bash -c 'train_alone {}'
}

students_of() { # SEED; settings on standard input -> lines of arguments of `train_alone`
    while read -r name recipe options; do
        [ -n "$name" ] && wanted "$name" || continue
        [[ "$options" = *teacher.weights=* ]] || ! grep -q '^teacher:' "launch/recipes/$recipe.yaml" ||
            options="teacher.weights=$OUT/teacher-seed$1${weights:-} $options"
        echo "'$name' $1 $recipe ${options//SEED/$1}"
    done
}

wanted() { # NAME
    [ -z "$ONLY" ] || [[ " $ONLY " = *" $1 "* ]]
}


# Sourced by study.sh with DATA=clipart: the environment, shards of launch/clipart.sh, and settings: those
# on digits with the changes below, without the baselines CRD and SRRL, which take 8 minutes of CPU each. With
# 1.8 times as many images the same epochs are 1.8 times as many steps. On an AMD core the teacher takes 4
# minutes, MAE and DMAE 1 to 2 each; ONLY="mae dmae" SEEDS=0 takes 15 from a fresh clone, the install with it.
# So few steps teach little; TIMES=5 does (BENCHMARKS.md), with 8 minutes for DMAE and more than twice that
# for its teacher.
# launch/recipes/clipart_*.yaml are the first three, for use alone.
. launch/venv.sh
[ -z "${SRC:-}" ] && [ -e "$SHARDS/val/manifest.json" ] || OUT=$OUT bash launch/clipart.sh

changes_of() { # RECIPE: images of 64 px in 8x8 patches, as many as on digits; a mirrored drawing is one, too
    local file=launch/recipes/$1.yaml
    echo student.img_size=64 student.patch_size=8 data.flip=true
    ! grep -q '^teacher:' "$file" || echo teacher.img_size=64 teacher.patch_size=8
    ! grep -q '^teachers:' "$file" || echo teachers.{mae,moco}.{img_size=64,patch_size=8}
    ! grep -q '^  local_size:' "$file" || echo objective.local_size=48
    case $1 in # by DATA=clipart_rates, three tries each, SdAE six; unchanged where that gains less than .5
    digits_teacher) echo optim.epochs=24 ;; # not tuned
    digits_sdae) echo optim.base_lr=4e-3 "$(momentum_of_epochs)" ;;
    digits_dino) echo optim.base_lr=2e-3 ;;
    digits_mocov3*) echo optim.base_lr=1.2e-2 ;; # tuned alone
    esac
}
momentum_of_epochs() { # SdAE's, changed once an epoch: the same shares of a run of any length
    awk "BEGIN {printf \"objective.momentum=[%g,%g]\", 1 - .75 / $TIMES, 1 - .2 / $TIMES}"
}
schedule_of() { # RECIPE
    sed -nE 's/(^optim: \{.* |^  )(epochs: )([0-9.]+).*/optim.epochs=\3/p' "launch/recipes/$1.yaml"
    sed -nE 's/.* (warmup_epochs: )([0-9.]+).*/optim.warmup_epochs=\2/p' "launch/recipes/$1.yaml"
}
longer() { # options on standard input; epochs are multiplied by TIMES, those of warm-up by half of it
    awk -v times="$TIMES" '{
        for (i = 1; i <= NF; i++) {
            split($i, part, "=")
            if (part[1] == "optim.epochs") $i = part[1] "=" part[2] * times
            if (part[1] == "optim.warmup_epochs" && times > 1) $i = part[1] "=" part[2] * times / 2
        }
        print
    }'
}
options_of() { # RECIPE [key=value ...]: with the changes; the given keys come last and win
    local options
    options="$(changes_of "$1" | xargs) ${*:2}"
    [ "$TIMES" = 1 ] || options=$(echo "$(schedule_of "$1" | xargs) $options" | longer)
    echo "$options"
}
with_changes() { # settings on standard input
    local name recipe options
    while read -r name recipe options; do
        [ -z "$name" ] || echo "$name $recipe $(options_of "$recipe" "$options")"
    done
}
BASELINES=""
TEACHER=$(with_changes <<<"teacher digits_teacher")
[ "$TIMES" = 1 ] || TEACHER+=" optim.warmup_epochs=6" # not tuned
SETTINGS=$(with_changes <<<"$SETTINGS")
CLASSIFIERS=$(with_changes <<<"$CLASSIFIERS")
CONTINUED=$(with_changes <<<"$CONTINUED")
[ "$TIMES" = 1 ] || section+=-x$TIMES

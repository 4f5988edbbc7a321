# Sourced by study.sh with DATA=clipart: the environment, shards of launch/clipart.sh, and settings: those
# on digits with the changes below, without the baselines CRD and SRRL, which take 8 minutes of CPU each. With
# 1.8 times as many images the same epochs are 1.8 times as many steps. On an AMD core the teacher takes 4
# minutes, MAE and DMAE 1 to 2 each; ONLY="mae dmae" SEEDS=0 takes 15 from a fresh clone, the install with it.
# launch/recipes/clipart_*.yaml are the first three, for use alone.
. launch/venv.sh
[ -e "$OUT/shards/val/manifest.json" ] || OUT=$OUT bash launch/clipart.sh

changes_of() { # RECIPE: images of 64 px in 8x8 patches, as many as on digits; a mirrored drawing is one, too
    local file=launch/recipes/$1.yaml
    echo student.img_size=64 student.patch_size=8 data.flip=true
    ! grep -q '^teacher:' "$file" || echo teacher.img_size=64 teacher.patch_size=8
    ! grep -q '^teachers:' "$file" || echo teachers.{mae,moco}.{img_size=64,patch_size=8}
    ! grep -q '^  local_size:' "$file" || echo objective.local_size=48
    case $1 in # by study.sh with DATA=clipart_rates, three tries each; what gained less than .5 stays
    digits_teacher) echo optim.epochs=24 ;; # not tuned
    digits_sdae) echo optim.base_lr=1e-3 ;;
    digits_dino) echo optim.base_lr=2e-3 ;;
    digits_mocov3*) echo optim.base_lr=1.2e-2 ;; # tuned alone
    esac
}
with_changes() { # settings on standard input; a setting's own keys come last and win
    local name recipe options
    while read -r name recipe options; do
        [ -z "$name" ] || echo "$name $recipe $(changes_of "$recipe" | xargs) $options"
    done
}
BASELINES=""
TEACHER=$(with_changes <<<"teacher digits_teacher")
SETTINGS=$(with_changes <<<"$SETTINGS")
CLASSIFIERS=$(with_changes <<<"$CLASSIFIERS")
CONTINUED=$(with_changes <<<"$CONTINUED")
# Where ONLY names them: five times the steps, of the teacher too.
if [ -n "$ONLY" ]; then
    SETTINGS+=$'\n'$(with_changes <<<"
teacher-x5 digits_teacher optim.epochs=120 optim.warmup_epochs=6
mae-x5     digits_mae     optim.epochs=80 optim.warmup_epochs=5")
    CONTINUED+=$'\n'$(with_changes <<<"
dmae-x5    digits_dmae    optim.epochs=80 optim.warmup_epochs=5 teacher.weights=$OUT/teacher-x5-seedSEED")
fi
RESULTS=("clipart=$OUT" --out "$OUT/RESULTS.md")

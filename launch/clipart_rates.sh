# Sourced by study.sh with DATA=clipart_rates: the learning rates of DATA=clipart, tuned without its val. Of
# seed 0's training images every tenth is held out; each recipe trains on the others with its rate on digits
# times each of FACTORS, with a teacher of the same images. The slow recipes are not tuned: DMAE's term with
# another objective, several teachers, features_masked. STUDY: the study's folder, for its images.
STUDY=${STUDY:-runs/study_clipart}
FACTORS=${FACTORS:-.5 1 2}
RECIPES="mae dmae g2sd_generic sdae dino mocov3 tinymim amd features"

part() { # NAME FILTER: shards of the links to training images that sed's FILTER leaves
    mkdir -p "$OUT/images/$1"
    (cd "$STUDY/images/train" && find . -type l -print0 | LC_ALL=C sort -z | sed -z "$2" | tar --null -T - -cf -) |
        tar -C "$OUT/images/$1" -xf -
    dmae-shards make "$OUT/images/$1" "$OUT/shards/$1" --resize 96
}

SEEDS=0 CLASSIFIERS="" CONTINUED="" FINETUNED="" BASELINES=""
SETTINGS=$(for recipe in $RECIPES; do
    rate=$(sed -n 's/^optim:.* base_lr: \([^,]*\),.*/\1/p' "launch/recipes/digits_$recipe.yaml")
    for factor in $FACTORS; do
        echo "${recipe//_/-}-x$factor digits_$recipe optim.base_lr=$(awk "BEGIN {print $rate * $factor}")"
    done
done)
expect_names ONLY $ONLY <<<"$TEACHER"$'\n'"$SETTINGS"
. launch/venv.sh
if [ ! -e "$OUT/shards/val/manifest.json" ]; then
    [ -z "${SRC:-}" ] && [ -d "$STUDY/images" ] || OUT=$STUDY bash launch/clipart.sh
    part train '0~10d'
    part val '0~10!d'
fi
SRC= # its images are those of STUDY
. launch/clipart_study.sh

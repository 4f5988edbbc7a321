#!/usr/bin/env bash
# Real pictures of many kinds as shards: Debian's openclipart-png (public domain), or another image folder:
#   bash launch/clipart.sh               # OUT=folder; $OUT/shards/train and val, in two minutes
#   SRC=photos bash launch/clipart.sh    # SRC/<class>/**/<image>
# The package is taken where it is installed (PACKAGE=folder), else fetched and unpacked into $OUT, without
# root. What is chosen and left out, with all numbers: launch/clipart.py. In an environment that has this project.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh
expect_no_words SRC=photos "$@"
OUT=${OUT:-runs/clipart}
SRC=${SRC:-}
FOLDER=/usr/share/openclipart/png
PACKAGE=${PACKAGE:-$FOLDER}

fetch() { # into $OUT/openclipart, whole or not at all
    local new="$OUT/openclipart.tmp"
    rm -rf "$new" && mkdir -p "$new"
    (cd "$new" && apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb . && rm -- *.deb) ||
        refuse "openclipart-png was not fetched; run apt-get update as root, or set SRC to a folder of" \
            "class folders with images"
    mv "$new" "$OUT/openclipart"
}

if [ -z "$SRC" ] && [ ! -d "$OUT/openclipart" ] && [ -d "$PACKAGE" ]; then
    SRC=$PACKAGE
elif [ -z "$SRC" ]; then
    [ -d "$OUT/openclipart" ] || fetch
    SRC=$OUT/openclipart$FOLDER
fi
python launch/clipart.py "$SRC" "$OUT"

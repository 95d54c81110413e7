#!/bin/sh
# The whole road on a small Mixtral: a checkpoint becomes a quantization table and a chat.
# `make demo` runs it; by hand: PATH=.venv/bin:$PATH sh examples/demo.sh
set -eu
cd "$(dirname "$0")/.."

# a library of its own, so that yours stays as it is
LOCALMIX_HOME=$PWD/build/demo
export LOCALMIX_HOME
mkdir -p "$LOCALMIX_HOME"

bold='' plain='' green=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$(printf '\033[1m') green=$(printf '\033[32m') plain=$(printf '\033[0m')
fi

say() {
    printf '\n%s# %s%s\n' "$green" "$*" "$plain"
}

# Show a command as it would be typed, then run it.
run() {
    printf '%s$ ' "$bold"
    for word in "$@"; do
        case $word in
            *[!A-Za-z0-9_./:=,-]*) printf '"%s" ' "$word" ;;
            *) printf '%s ' "$word" ;;
        esac
    done
    printf '%s\n' "$plain"
    "$@"
}

say "A checkpoint becomes one GGUF file."
run localmix convert examples/tinymix

say "What would each type take? Nothing is written for the answer."
run localmix plan --set chinese-mixtral --imatrix

say "Which weights matter? A calibration text shows it."
run localmix imatrix --corpus examples/tinymix/calibration.txt

say "All types of the published table, from one read."
run localmix quantize chinese-mixtral

say "What did it cost? Perplexity on a text the model has never seen; the last column is speed."
run localmix ppl --set chinese-mixtral --corpus examples/tinymix/heldout.txt --chunks 20

say "As large as Q2_K, but the type of each tensor is chosen for this model. Which of the two is nearer to the original?"
run localmix quantize tinymix --target 2.66MiB
run localmix compare tinymix:Q2_K tinymix:2.66MiB --kld tinymix:BF16 --corpus examples/tinymix/heldout.txt --chunks 20

say "And it talks."
run localmix chat tinymix:Q4_K -p "Where does Wilma live?"

say "A small model guesses ahead and the large one checks: the same answer. It pays where the large one is large."
run localmix convert examples/tinymix-draft
run localmix chat tinymix:Q4_K --draft tinymix-draft -p "Where does Wilma live?"

printf '\nThe models are in build/demo. Talk on with:\n\n'
printf '  LOCALMIX_HOME=build/demo localmix chat tinymix:Q4_K\n\n'

# Sourced by train.sh, and by the scripts whose settings are variables: checks of what a user wrote. A mistake
# is one line, and exit code 2.
refuse() { # WORD ...: say what is wrong, and end
    echo "${0##*/}: $*" >&2
    exit 2
}
expect_numbers() { # NAME LEAST NUMBER ...: each is a whole number from LEAST on
    local number
    [ $# -gt 2 ] || refuse "$1 is empty, expected a whole number from $2 on"
    for number in "${@:3}"; do
        case $number in
        "" | *[!0-9]* | 0?*) ;;
        *) [ "$number" -lt "$2" ] || continue ;;
        esac
        refuse "$1 has '$number', expected a whole number from $2 on"
    done
}
expect_no_words() { # EXAMPLE WORD ...: the words behind the script's name; EXAMPLE is a setting it has
    local example=$1
    [ $# -gt 1 ] || return 0
    [[ ! "$2" =~ ^[A-Z]+= ]] || example="${2%%=*}=$(printf %q "${2#*=}")"
    refuse "'$2' is not read; settings come before the command: $example bash launch/${0##*/}"
}

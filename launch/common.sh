# shellcheck shell=bash
# Sourced by the launch scripts: their frame. What comes after -- is a dopsd_jax command and its
# arguments, in COMMAND; --dry-run prints what would be run and runs nothing.
DRY_RUN="" COMMAND=() REST=()

fail() { echo "error: $*" >&2; exit 1; }

# The comment at the head of a script is its help.
show_help() { sed -n '2,/^[^#]/{s/^#SBATCH.*//;s/^# \{0,1\}//p}' "$1"; exit 0; }

# A command line as it could be typed.
quote() {
  local word line=""
  for word in "$@"; do
    [[ "$word" =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]] || word="${word@Q}"
    line+=" $word"
  done
  echo "${line# }"
}

# Prints a command, and runs it unless this is a dry run.
run() {
  quote "$@"
  [ -n "$DRY_RUN" ] || "$@"
}

# options SCRIPT "name! name=default flag:" "$@": options --NAME VALUE and --FLAG into variables of
# their name, in capitals; those with "!" must be given. What begins with -- alone is left in REST.
options() {
  local script="$1" spec="$2" name upper word missing=""
  local -A kind=()
  shift 2
  for word in $spec; do
    name="${word%%[=:!]*}"
    kind[$name]="${word:${#name}:1}"
    printf -v "${name^^}" %s "${word:${#name}+1}"
  done
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    name="${1#--}"
    case "$1" in
      --help | -h) show_help "$script" ;;
      --dry-run) DRY_RUN=yes ;;
      *)
        [[ "$1" == --* && -n "${kind[$name]:-}" ]] || fail "unknown option $1; see $script --help"
        if [ "${kind[$name]}" = ":" ]; then
          printf -v "${name^^}" yes
        else
          [[ $# -gt 1 && "$2" != --* ]] || fail "$1 needs a value"
          printf -v "${name^^}" %s "$2"
          shift
        fi ;;
    esac
    shift
  done
  for word in $spec; do
    name="${word%!}" upper="${name^^}"
    [ "$name" = "$word" ] || [ -n "${!upper}" ] || missing+=" --$name"
  done
  [ -z "$missing" ] || fail "needed:$missing; see $script --help"
  REST=("$@")
}

# The same of a script that runs what comes after --, in COMMAND.
parse() {
  options "$@"
  set -- "${REST[@]}"
  [ $# -gt 1 ] || fail "give a dopsd_jax command after --, such as -- train --config .."
  shift
  [[ " $(commands) " == *" $1 "* ]] || fail "no such command: $1; there is: $(commands)"
  # shellcheck disable=SC2034
  COMMAND=("$@")
}

commands() {
  grep -l "run_command(main" dopsd_jax/*.py dopsd_jax/*/__main__.py |
    sed 's|/__main__\.py||;s|.*/||;s|\.py||' | paste -sd ' '
}

"""The scripts that `completion` prints. Each asks `mlxctl __complete`."""

from __future__ import annotations

BASH = r"""# Completion of mlxctl for bash. Made by: mlxctl completion bash
_mlxctl() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        if [ "$line" = :files ]; then
            compopt -o default 2>/dev/null
        elif [ -n "$line" ]; then
            COMPREPLY+=("$line")
        fi
    done < <("$1" __complete bash "$COMP_WORDBREAKS" "${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
}
complete -F _mlxctl mlxctl
"""

ZSH = r"""#compdef mlxctl
# Completion of mlxctl for zsh. Made by: mlxctl completion zsh
_mlxctl() {
    local line
    local -a values meanings
    for line in "${(@f)$("${(Q)words[1]}" __complete zsh "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}"; do
        if [[ $line == :files ]]; then
            _files
            return
        fi
        [[ -n $line ]] || continue
        values+=("${line%%$'\t'*}")
        meanings+=("${line/$'\t'/  -- }")
    done
    compadd -l -d meanings -a values
}
if [[ $funcstack[1] == _mlxctl ]]; then
    _mlxctl "$@"
else
    compdef _mlxctl mlxctl
fi
"""

FISH = r"""# Completion of mlxctl for fish. Made by: mlxctl completion fish
function __mlxctl_complete
    set -l words (commandline -opc)
    set -l program $words[1]
    set -e words[1]
    set -l found (command $program __complete fish $words (commandline -ct) 2>/dev/null)
    if test "$found" = :files
        __fish_complete_path (commandline -ct)
    else
        printf '%s\n' $found
    end
end
complete -c mlxctl -f -a '(__mlxctl_complete)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}

# SPDX-License-Identifier: MIT
# Completion of microvm(8) for bash. Starts no program: names are looked up in the file system.

# Prints the VMs for which a sub-command makes sense.
_microvm_vms() {
    local root=${MICROVM_HOST_ROOT-} directory name
    root=${root%/}
    for directory in "$root"/var/lib/microvms/*/; do
        directory=${directory%/}
        name=${directory##*/}
        case $1 in
            start | run | adopt) [[ ! -L $directory/booted ]] || continue ;;
            stop | ssh | console | exec | balloon | pause | resume) [[ -L $directory/booted ]] || continue ;;
            update) [[ -e $directory/flake || -e $directory/runner || -e $directory/declaration ]] || continue ;;
            show | history | rollback) [[ -e $directory/declaration ]] || continue ;;
            remove)
                [[ ! -L $directory/booted && ! -e $root/etc/microvms/$name.toml ]] || continue
                ;;
        esac
        # Without any VM, bash leaves the pattern as it is.
        [[ ! -d $directory ]] || printf '%s\n' "$name"
    done
}

# Offers the beginnings of the digests of the packages that a VM had, but for the current one.
_microvm_packages() {
    local root=${MICROVM_HOST_ROOT-} package
    root=${root%/}
    options=
    for package in "$root"/var/lib/microvm-host/packages/*-"$1"/; do
        package=${package%/}
        # Another VM's name may end like this one; a digest has no `-`.
        [[ -d $package && ${package##*/} == +([!-])-"$1" ]] || continue
        [[ ! $package -ef $root/var/lib/microvms/$1/current ]] || continue
        package=${package##*/}
        options+=" ${package:0:12}"
    done
    mapfile -t COMPREPLY < <(compgen -W "$options" -- "$current")
}

# Gives the sub-command that the words so far stand for, in $command.
_microvm_command() {
    local word
    command=
    for word in "$@"; do
        case $word in
            --*) ;;
            -*l*) command=list ;;
            -*c*) command=create ;;
            -*u*) command=update ;;
            -*r*) command=run ;;
            -*s*) command=ssh ;;
            -*) ;;
            # Without a flag before it, the first word that is no option.
            *) [[ $command ]] || command=$word ;;
        esac
        [[ ! $command ]] || return 0
    done
}

_microvm() {
    # Not COMP_WORDS: bash parts the words at ':' and '@' too, which names and users have.
    local line=${COMP_LINE:0:COMP_POINT} current previous command options prefix= word
    local -a before
    current=${line##*[[:space:]]}
    read -ra before <<< "${line%"$current"}"
    previous=${before[-1]}
    before=("${before[@]:1}")
    COMPREPLY=()
    _microvm_command "${before[@]}"
    # By its other names.
    case $command in
        ls | ps) command=list ;;
        rm) command=remove ;;
    esac

    case $command:$previous in
        create:--runner | create:--flake | create:-f | create:-*f | build:-o | build:--output)
            compopt -o filenames 2> /dev/null || :
            mapfile -t COMPREPLY < <(compgen -d -- "$current")
            return 0
            ;;
        init:--kernel | init:--ssh-key | init:-o | init:--output)
            compopt -o filenames 2> /dev/null || :
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            return 0
            ;;
    esac

    case $command:$previous in
        create:--user | adopt:--user) options='auto microvm' ;;
        adopt:--from) options=microvm ;;
        init:--guest) options='debian small' ;;
        *) options= ;;
    esac
    if [[ $options ]]; then
        :
    elif [[ ! $command ]]; then
        options='adopt apply balloon build console create exec history init list logs network
            pause pci reconcile remove restart resume rollback run show ssh start status stop update'
        [[ $current != -* ]] || options='-l -c -u -r -s -h --help --version'
    elif [[ $current == -* ]]; then
        case $command in
            adopt) options='--from --user' ;;
            build) options='-o --output' ;;
            balloon | network | show) options='--json' ;;
            history) options='--diff --json' ;;
            console) options='-r --read-only -e --escape -n --lines -w --wait' ;;
            exec) options='-i --stdin -t --timeout' ;;
            rollback) options='-R --restart' ;;
            apply) options='-n --dry-run --json' ;;
            create) options='-f --flake --runner --user --start' ;;
            init) options='--guest --memory --kernel --suite --mirror --login --ssh-key --disk --fresh
                --force -o --output' ;;
            list) options='-a --all --check -l --lines --json' ;;
            pci) options='-a --all --json' ;;
            reconcile) options='--apply -y --yes --json' ;;
            remove) options='-y --yes' ;;
            status) options='--json' ;;
            update) options='-R --restart' ;;
            *) options= ;;
        esac
        options+=' -h --help'
    else
        case $command in
            # One name, then what is not ours to complete.
            adopt | balloon | console | exec | history | logs | run | show | ssh)
                for word in "${before[@]:1}"; do
                    [[ $word == -* ]] || return 0
                done
                ;;
            network)
                [[ ! ${before[*]:1} ]] || return 0
                mapfile -t COMPREPLY < <(compgen -W 'disable enable' -- "$current")
                return 0
                ;;
            pci)
                # `check`, and one VM after it.
                case ${before[*]:1} in
                    '')
                        mapfile -t COMPREPLY < <(compgen -W check -- "$current")
                        return 0
                        ;;
                    check) ;;
                    *) return 0 ;;
                esac
                ;;
            build)
                compopt -o filenames 2> /dev/null || :
                mapfile -t COMPREPLY < <(compgen -f -X '!*.toml' -- "$current"; compgen -d -- "$current")
                return 0
                ;;
            rollback)
                # One name, and one of the packages that it had.
                local -a given_words=()
                for word in "${before[@]:1}"; do
                    [[ $word == -* ]] || given_words+=("$word")
                done
                if ((${#given_words[@]})); then
                    ((${#given_words[@]} > 1)) || _microvm_packages "${given_words[0]}"
                    return 0
                fi
                ;;
            list | pause | remove | restart | resume | start | status | stop | update) ;;
            *) return 0 ;;
        esac
        [[ $command != ssh || $current != *@* ]] || prefix=${current%@*}@
        options=
        while read -r word; do
            # Names that stand there already are of no use again.
            [[ " ${before[*]:1} " == *" $word "* ]] || options+=" $prefix$word"
        done < <(_microvm_vms "$command")
    fi
    mapfile -t COMPREPLY < <(compgen -W "$options" -- "$current")

    # What lies before the last word break is given already, as readline sees it.
    local given=${current%"${current##*[:@]}"}
    if [[ $given ]]; then
        for word in "${!COMPREPLY[@]}"; do
            COMPREPLY[word]=${COMPREPLY[word]#"$given"}
        done
    fi
}

complete -F _microvm microvm

# SPDX-License-Identifier: MIT
"""The sub-commands as a group that knows other names for them, and what a misspelt one meant."""

from __future__ import annotations

import click

from ..errors import EXIT_FAILED, EXIT_USAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# Other names for sub-commands, as podman and the shell have them.
ALIASES: Mapping[str, str] = {"ls": "list", "ps": "list", "rm": "remove"}
# What other tools call it -> what to type here.
_ELSEWHERE = {
    "attach": "microvm console",
    "autostart": "systemctl enable microvm@NAME",
    "cat": "microvm status",
    "define": "microvm create",
    "delete": "microvm remove",
    "destroy": "microvm stop",
    "disable": "systemctl disable microvm@NAME",
    "dominfo": "microvm status",
    "dumpxml": "microvm show",
    "edit": "editor /etc/microvms/NAME.toml && microvm apply",
    "enable": "systemctl enable microvm@NAME",
    "help": "microvm --help",
    "info": "microvm status",
    "inspect": "microvm status --json",
    "journal": "microvm logs",
    "kill": "systemctl kill microvm@NAME",
    "login": "microvm console",
    "poweroff": "microvm stop",
    "reboot": "microvm restart",
    "reload": "microvm apply",
    "shell": "microvm ssh",
    "shutdown": "microvm stop",
    "suspend": "microvm pause",
    "terminate": "microvm stop",
    "top": "systemd-cgtop machine.slice",
    "undefine": "microvm remove",
    "unpause": "microvm resume",
    "upgrade": "microvm update",
    "version": "microvm --version",
}


class Commands(click.Group):
    """`microvm` itself, and its sub-commands that have some of their own."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, _own_name(ctx, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            from ..declaration.nearest import nearest

            meant = nearest(name, self.list_commands(ctx))
            meant = meant and f"{ctx.command_path} {meant}"
            if ctx.parent is None:
                meant = _ELSEWHERE.get(name, meant)
            ctx.fail(f"No such command {name!r}." + (f" Did you mean `{meant}`?" if meant else ""))
        # By its own name from here on, in its help too.
        return super().resolve_command(ctx, [_own_name(ctx, name), *args[1:]])


def _own_name(ctx: click.Context, name: str) -> str:
    return ALIASES.get(name, name) if ctx.parent is None else name


def run(group: click.Group, arguments: list[str]) -> int:
    """Run a sub-command; gives the exit code, unless the sub-command exits by itself."""
    try:
        code = group.main(arguments, prog_name="microvm", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE if error.exit_code == EXIT_USAGE else EXIT_FAILED
    except click.Abort:
        # Ctrl-C, or Ctrl-D in answer to a question.
        click.echo("microvm: interrupted", err=True)
        return 130
    return code if isinstance(code, int) else 0

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
    "define": "microvm create",
    "delete": "microvm remove",
    "destroy": "microvm stop",
    "disable": "systemctl disable microvm@NAME",
    "dominfo": "microvm status",
    "edit": "microvm apply, after a change in /etc/microvms",
    "enable": "systemctl enable microvm@NAME",
    "info": "microvm status",
    "inspect": "microvm status --json",
    "kill": "systemctl kill microvm@NAME",
    "login": "microvm console",
    "poweroff": "microvm stop",
    "reboot": "microvm restart",
    "reload": "microvm apply",
    "shell": "microvm ssh",
    "shutdown": "microvm stop",
    "terminate": "microvm stop",
    "undefine": "microvm remove",
    "upgrade": "microvm update",
}


class Commands(click.Group):
    """`microvm` itself."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            from ..declaration.nearest import nearest

            meant = _ELSEWHERE.get(name) or nearest(name, self.list_commands(ctx))
            if meant and " " not in meant:
                meant = f"microvm {meant}"
            ctx.fail(f"No such command {name!r}." + (f" Did you mean `{meant}`?" if meant else ""))
        # By its own name from here on, in its help too.
        return super().resolve_command(ctx, [ALIASES.get(name, name), *args[1:]])


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

"""How fields of `--config` may be spelled on the command line."""

import re

_INIT_FROM = re.compile(r"(--?config\.init_from)(?:=(.*))?", re.DOTALL)


def spelled_out(argv: list[str]) -> list[str]:
    """`--config.init_from=CKPT` as `--config.init_from.all=CKPT`; other arguments as they are.

    For ml_collections a field has a value or fields of its own: it takes `init_from` as a whole
    only as a dict ("{'vit': 'CKPT'}"), which stays. It reads `sys.argv` itself, so that is what
    commands replace.
    """
    out = []
    for i, argument in enumerate(argv):
        found = _INIT_FROM.fullmatch(argument)
        if found:
            apart = found[2] is None  # the value is the next argument
            value = "".join(argv[i + 1 : i + 2]) if apart else found[2]
            if not value.lstrip().startswith("{"):
                argument = f"{found[1]}.all" + ("" if apart else f"={value}")
        out.append(argument)
    return out

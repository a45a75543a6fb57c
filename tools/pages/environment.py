"""The page of environment variables."""

from polyshard.core.environment import VARIABLES
from tools.pages.tables import markdown


def page() -> str:
    former = [v for v in VARIABLES if v.former_name or v.former_values]
    lines = [
        "# Environment variables\n",
        "polyshard reads these variables. Those of torchrun (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, ...) and of vLLM",
        "(`VLLM_...`) keep their usual meaning.\n",
        markdown(("variable", "meaning"), ((f"`{v.name}`", v.meaning) for v in VARIABLES if not v.internal)),
        "polyshard sets these for processes that it starts. Do not set them yourself.\n",
        markdown(("variable", "meaning"), ((f"`{v.name}`", v.meaning) for v in VARIABLES if v.internal)),
        "## Former names\n",
        "A former name or value works until version 0.3, with a `DeprecationWarning`.\n",
        markdown(
            ("former", "present"),
            (
                (f"`{v.former_name or v.name}={old}`", f"`{v.name}={new}`")
                for v in former
                for old, new in {**({"...": "..."} if v.former_name else {}), **v.former_values}.items()
            ),
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"

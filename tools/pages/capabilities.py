"""What each adapter supports, and which versions of its library."""

import polyshard as ps
from polyshard.core.capabilities import FEATURES
from polyshard.transformers.replaced.requirement import TRANSFORMERS
from tools.pages.tables import markdown


def table() -> str:
    names = ps.adapter_names()

    def cells(feature: str) -> list[str]:
        answers = [ps.load_adapter(name).capabilities[feature] for name in names]
        return ["yes" if answer.available else f"no: {answer.reason}" for answer in answers]

    return markdown(("", *names), ((meaning, *cells(feature)) for feature, meaning in FEATURES.items()))


def versions() -> str:
    needed = (*(ps.load_adapter(name).requirement for name in ps.adapter_names()), TRANSFORMERS)
    rows = ((n.title, f"`{n.supported}`", ", ".join(n.tested), f"`{n.install}`") for n in needed)
    return markdown(("library", "supported", "tested", "installed by"), rows)

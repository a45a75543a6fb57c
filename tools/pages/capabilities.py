"""What each adapter supports, and which versions of its library."""

import polyshard as ps
from polyshard.adapters.torch.float8 import TORCHAO
from polyshard.core.capabilities import FEATURES
from polyshard.lora.requirement import PEFT
from polyshard.transformers.replaced.requirement import TRANSFORMERS
from tools.pages.tables import markdown


def table() -> str:
    """Yes or no by feature and adapter, the reason for each no, and what provides a feature if that is recorded."""
    names = ps.adapter_names()
    answers = {name: ps.load_adapter(name).capabilities for name in names}
    rows = []
    reasons: dict[tuple[str, str, str | None], list[str]] = {}
    provided: list[tuple[str, str, str, str]] = []
    for feature, meaning in FEATURES.items():
        rows.append((meaning, *("yes" if answers[name][feature].available else "no" for name in names)))
        for name in names:
            answer = answers[name][feature]
            if answer.available and answer.reason:
                without = ", ".join(f"`{other}`" for other in answer.without)
                provided.append((name, f"`{feature}`", answer.reason, without))
            if not answer.available:
                reasons.setdefault((name, answer.reason, answer.whose), []).append(f"`{feature}`")
    meanings = [(f"{row[0]} (`{feature}`)", *row[1:]) for feature, row in zip(FEATURES, rows)]
    why = [(name, ", ".join(features), reason, whose) for (name, reason, whose), features in sorted(reasons.items())]
    tables = (
        markdown(("feature", *names), meanings),
        markdown(("adapter", "lacks", "reason", "limit"), why),
        markdown(("adapter", "has", "provided by", "not with"), sorted(provided)),
    )
    return "\n".join(tables)


def versions() -> str:
    needed = (*(ps.load_adapter(name).requirement for name in ps.adapter_names()), TRANSFORMERS, PEFT, TORCHAO)
    rows = ((n.title, f"`{n.supported}`", ", ".join(n.tested), f"`{n.install}`") for n in needed)
    return markdown(("library", "supported", "tested", "installed by"), rows)

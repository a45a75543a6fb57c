"""Fields of config.json that polyshard reads, with each family's default."""

from polyshard.config.families import OPTIONAL
from polyshard.config.file import REQUIRED
from tools.pages.tables import markdown


def page() -> str:
    fields = list(dict.fromkeys(name for family in OPTIONAL.values() for name in family))

    def default(family: str, field: str) -> str:
        return f"`{OPTIONAL[family][field]!r}`" if field in OPTIONAL[family] else ""

    rows = ((f"`{field}`", *(default(family, field) for family in OPTIONAL)) for field in fields)
    lines = [
        "# Configuration fields\n",
        "`polyshard.read_config` reads a Hugging Face `config.json`, and `polyshard.complete_config` fills in the",
        "defaults of the family's class in transformers, so that a trainer and a server build the same model.\n",
        "These fields are required. A file without one of them is refused with the names of the file and the field.\n",
        ", ".join(f"`{name}`" for name in REQUIRED) + "\n",
        "The defaults of the other fields depend on `model_type`. An empty cell means that the family has no such",
        "field, and that polyshard ignores it as transformers does.\n",
        markdown(("field", *(f"`{family}`" for family in OPTIONAL)), rows),
        "Rotary embedding is configured by `rope_parameters`, or in files of transformers 4 by `rope_theta`,",
        "`rope_scaling`, `partial_rotary_factor` and `original_max_position_embeddings`.",
    ]
    return "\n".join(lines).rstrip() + "\n"

"""What each generated page and table is made by."""

from collections.abc import Callable, Mapping

from tools.pages import (
    api,
    benchmarks,
    capabilities,
    command_line,
    configuration,
    environment,
    kernels,
    packages,
    scale,
)

PAGES: Mapping[str, Callable[[], str]] = {
    **{f"reference/api/{name}.md": make for name, make in api.pages().items()},
    "reference/command-line.md": command_line.page,
    "reference/environment.md": environment.page,
    "reference/configuration.md": configuration.page,
}
TABLES: Mapping[str, Callable[[], str]] = {
    "packages": packages.table,
    "kernels": kernels.table,
    "capabilities": capabilities.table,
    "versions": capabilities.versions,
    **benchmarks.tables(),
    **scale.tables(),
}

"""The third party's own test, in a file of its own."""

from polyshard.testing import AdapterSuite


class TestExample(AdapterSuite):
    adapter = "example"
    engines = ({"data_parallel": "ddp"},)

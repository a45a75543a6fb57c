"""`polyshard plan` prints tables, writes JSON and a picture, and its exit status says whether a layout fits."""

import json

import pytest
from support.command_line import polyshard
from support.planned_cases import CONFIG


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


ASKED = ("--gpus", 4, "--tokens-per-step", "4K", "--sequence-length", 256)
ASKED += ("--adapters", "fairscale", "--recompute", "full", "--sharding", "data,fsdp")


def test_the_plan_is_printed_and_written(capfd, config, tmp_path):
    picture = tmp_path / "plan.svg"
    options = ("--memory", "8GiB", "--json", tmp_path / "plan.json", "--picture", picture, "--serve", 2)
    done = polyshard(capfd, "plan", config, *ASKED, *options)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "plan.json").read_text())
    best = written["layouts"][0]
    assert f"fastest {min(12, len(written['layouts']))} of {len(written['layouts'])} layouts that fit" in done.stdout
    assert best["memory"]["total"] == sum(n for kind, n in best["memory"].items() if kind != "total")
    assert best["adapters"]
    assert "fairscale: fsdp: " in done.stdout
    assert "Times assume 60% of 989 TFLOP/s" in done.stdout
    assert written["serving"][0]["fits"]
    assert "<svg" in picture.read_text()


def test_the_exit_status_is_one_if_nothing_fits(capfd, config):
    done = polyshard(capfd, "plan", config, *ASKED, "--memory", "4100MiB", "--reserve", "4099MiB")
    assert done.returncode == 1
    assert "do not fit" in done.stdout


def test_wrong_options_are_named(capfd, config):
    done = polyshard(capfd, "plan", config, *ASKED, "--memory", "lots")
    assert done.returncode == 2
    assert "got 'lots', expected a number of bytes such as 80GiB" in done.stderr
    done = polyshard(capfd, "plan", config, *ASKED, "--memory", "8GiB", "--link", "wifi=1")
    assert "The link is unknown: got wifi, expected nvlink, net" in done.stderr


def test_measured_rates_replace_the_assumed_ones(capfd, config, tmp_path):
    file, options = tmp_path / "measured.json", ("--memory", "8GiB", "--layout", "data=4")
    file.write_text(json.dumps({"rows": [], "calibration": {"peak_flops": 2e13, "efficiency": 0.3}}))
    done = polyshard(capfd, "plan", config, *ASKED, *options, "--calibration", file)
    assert "Times assume 30% of 20 TFLOP/s" in done.stdout, done.stderr
    file.write_text('{"calibration": {"speed": 1}}')
    done = polyshard(capfd, "plan", config, *ASKED, *options, "--calibration", file)
    assert "the calibration is unknown: got speed, expected peak_flops, efficiency" in done.stderr
    file.write_text("{}")
    done = polyshard(capfd, "plan", config, *ASKED, *options, "--calibration", file)
    assert "holds no calibration: got KeyError" in done.stderr

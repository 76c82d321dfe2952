"""`stallfree serve` and `--version` as a user sees them in the first minute."""

import json
import os
import subprocess
import sys

import httpx
import pytest

from tests.waiting import PATIENCE_S

SIMULATED = ("serve", "--executor", "simulated", "--port", "0")


def begun(*arguments: str) -> tuple[str, str]:
    """Standard output and standard error of a server that is ended as soon as it serves."""
    command = [sys.executable, "-m", "stallfree", *SIMULATED, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        while not lines or not lines[-1].startswith("╰"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            lines.append(line)
        # What is said before the card is in the pipe now. Helper processes that are just starting would complain of the end.
        os.set_blocking(process.stderr.fileno(), False)
        try:
            said = os.read(process.stderr.fileno(), 1 << 16).decode()
        except BlockingIOError:
            said = ""
        process.kill()
        return "".join(lines), said


def test_the_version_is_told(stallfree):
    assert (0, "stallfree 0.1.0\n", "") == stallfree("--version")


def test_the_card_says_where_the_default_target_comes_from():
    out, err = begun()
    # The default target: five times the small batch that the policy counts in, at the simulated executor's prices.
    assert "policy     slo, tbt=67ms@p99" in out
    assert "default, the paper's strict SLO: 5 x 13.2 ms, an iteration of 8 decodes as simulated" in out
    assert "" == err


@pytest.mark.parametrize("arguments", [("--slo", "tbt=100ms"), ("--policy", "sarathi")])
def test_a_target_that_was_given_or_is_none_comes_from_nowhere(arguments):
    assert "default" not in begun(*arguments)[0]


def test_the_card_tells_of_host_memory():
    assert "host memory" in begun("--kv-host-memory", "8MiB")[0]
    assert "host memory" not in begun()[0]


def test_cached_prefixes_outlive_the_server(tmp_path):
    command = [sys.executable, "-m", "stallfree", *SIMULATED, "--json", "--kv-save", str(tmp_path / "kv")]
    body = {"prompt": "abcdefghijklmnop" * 8, "max_tokens": 2}
    cached = []
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            url = json.loads(process.stdout.readline())["url"]
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            process.terminate()
            errors = process.communicate(timeout=PATIENCE_S)[1]
    assert [0, 96] == cached
    assert "4 KV blocks of cached prefixes are back" in errors


def test_a_line_of_the_card_is_whole_in_a_pipe():
    out, _ = begun()
    assert all(line.startswith(("│ ", "╭", "╰")) and line.count("│") in (0, 2) for line in out.splitlines())
    assert 1 == sum("http://127.0.0.1:" in line and "/v1 " in line for line in out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "warns"),
    [
        (("--host", "0.0.0.0"), True),
        (("--host", "0.0.0.0", "--api-key", "x"), False),
        (("--host", "localhost"), False),
        ((), False),
    ],
)
def test_a_server_that_is_open_to_all_says_so(arguments, warns):
    assert warns == ("lets in all who can reach it; set STALLFREE_API_KEY" in begun(*arguments)[1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--api-key-file", "nowhere.keys"), "error: --api-key-file nowhere.keys cannot be read: No such file or directory"),
        (("--tls-key", "key.pem"), "error: --tls-key key.pem needs its other half; give --tls-certificate too"),
        (("--allow-origin", "app.example"), "error: --allow-origin 'app.example' is not an origin; write http://host"),
        (("--served-model-name", ""), "error: --served-model-name is empty"),
        (("--kv-save", "no/such/kv"), "error: --kv-save no/such/kv: there is no folder no/such; make it, or name another file"),
        (("--kv-save", __file__), "is not a file of saved KV, and would be written over; name another file, or remove it"),
        (("--kv-host-memory", "lots"), "lots"),
        (("--log-level", "loud"), "'loud' is not one of 'debug', 'info', 'warning', 'error'"),
        (("--log-format", "xml"), "'xml' is not one of 'text', 'json'"),
    ],
)
def test_what_a_server_cannot_do_is_refused_before_the_model_is_looked_for(stallfree, arguments, says):
    code, out, err = stallfree("serve", "no-such-model", "--port", "0", *arguments)
    assert (True, "") == (code in (1, 2), out)
    assert says in err
    assert "no-such-model" not in err


def test_the_card_has_all_names_of_the_model():
    out, _ = begun("--served-model-name", "first", "--served-model-name", "second")
    assert "model      first (none)" in out
    assert "also named second" in out


def test_a_file_of_keys_that_others_can_read_is_warned_of(tmp_path):
    file = tmp_path / "keys"
    file.write_text("web:first")
    file.chmod(0o644)
    assert f"can read or change --api-key-file {file}; run `chmod 600 {file}`\n" in begun("--api-key-file", str(file))[1]
    file.chmod(0o600)
    assert "" == begun("--api-key-file", str(file), "--host", "0.0.0.0")[1]

"""READMEs and guides: short, the same in both languages, and true of the options that the scripts have."""

import re

import pytest
from conftest import ROOT

PAIRS = [("README.md", "README.zh-CN.md"), ("docs/guide.md", "docs/guide.zh-CN.md")]
PAGES = [page for pair in PAIRS for page in pair]
SCRIPTS = ("prepare_dataset.py", "train_svd.py", "infer_svd.py")


def commands(page):
    """The lines of a page's bash blocks, without comments and blank lines."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    lines = [re.sub(r"(^|\s+)# .*", "", line).rstrip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("page", PAIRS[0])
def test_a_readme_has_at_most_150_lines(page):
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("english, chinese", PAIRS)
def test_both_languages_have_the_same_commands_headings_and_numbers(english, chinese):
    assert commands(english) == commands(chinese)
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in (english, chinese)]
    outline = [re.findall(r"^(#{1,4}) |^(```\w*)|^(\|)", text, re.M) for text in texts]
    assert outline[0] == outline[1]
    numbers = [sorted(re.findall(r"\d+\.\d+ (?:GiB|dB|cm|px)|\d+ %", text)) for text in texts]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_uses_options_of_its_script(page):
    text = "\n".join(commands(page)).replace("\\\n", " ")
    found = re.findall(r"(\w+\.py)((?: +[^\n]*)?)", text)
    assert found
    for script, arguments in found:
        if script in SCRIPTS:
            known = set(re.findall(r'"(--\w+)"', (ROOT / script).read_text(encoding="utf-8")))
            assert set(re.findall(r"(?<=\s)--\w+", arguments)) <= known, script


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(
                r"^#+ (.*)", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S), re.M
            )
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}  # as GitHub's
            assert anchor in slugs, anchor

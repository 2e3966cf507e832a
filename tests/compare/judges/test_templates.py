"""The question a judge is asked, and that nothing is guessed from its reply."""

import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.preferences.judging.template import TEMPLATES, load_template


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_template_loads_and_puts_texts_in_as_they_are(path):
    template = load_template(path.stem)
    text = template.messages("{{ 7 * 7 }} <b>", "{% raw %}", "second & last")[-1]["content"]
    assert "{{ 7 * 7 }} <b>" in text
    assert "{% raw %}" in text
    assert text.index("{% raw %}") < text.index("second & last")
    assert template.parse(template.answers["first"]) == 1.0
    assert template.parse(template.answers["second"]) == 0.0


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Both are fine, A is clearer.\nA", 1.0),
        ("Reasons.\n\n**B**\n", 0.0),
        ("The better reply is: (A)", 1.0),
        ("Verdict: B.", 0.0),
        ("Neither helps.\nTIE", 0.5),
        ("the better one is A", 1.0),
        ("A tie.", None),
        ("A is shorter than B", None),
        ("A or B", None),
        ("B is worse, so A is better", None),
        ("I cannot say.", None),
        ("", None),
        ("\n \n", None),
        ("Answer", None),
        ("a", None),
    ],
)
def test_nothing_is_guessed_from_a_reply(reply, expected):
    assert load_template("hh_helpfulness").parse(reply) == expected


def test_one_word_templates():
    template = load_template("alpaca_eval")
    assert [template.parse(reply) for reply in ("m", " M.", '"m"', "Model m", "")] == [1.0, 0.0, 1.0, None, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user: '{{ prompt }}'\nanswers: {first: A, second: B}", "first }} is not in it"),
        ("user: x\nanswer: {}", "Did you mean answers"),
        ("user: '{{ prompt }}{{ first }}{{ second }}'\nanswers: {first: A}", "first and second are needed"),
        ("- a", "keys source, system"),
    ],
)
def test_broken_templates_are_explained(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        load_template(str(tmp_path / "mine.yaml"))


def test_unknown_template_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean tldr"):
        load_template("tdlr")

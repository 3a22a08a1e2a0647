"""Chat formats written out by hand: a column of tokens beside a column of roles."""

from __future__ import annotations

import pytest

from ksweep.activations.chat_roles import TOKEN_ROLES, count_roles, detect_template, role_proportions, token_roles

SHORT = {"u": "user", "a": "assistant", "s": "system", ".": "special", "-": "other", "_": "pad"}


def check(text, template, **settings):
    """Tokens and their roles' first letters, one pair a word: "<bos>/. Hi/u". \\n stands for a line break, ~ for a space."""
    pairs = [word.rsplit("/", 1) for word in text.split()]
    tokens = [token.replace("\\n", "\n").replace("~", " ") for token, _ in pairs]
    assert list(zip(tokens, token_roles(tokens, template, **settings), strict=True)) == [
        (token, SHORT[role]) for token, (_, role) in zip(tokens, pairs, strict=True)
    ]


def test_gemma_names_turns_and_nobody_speaks_between_them():
    check(
        "<bos>/. <start_of_turn>/. user/. \\n/. Why/u ~is/u \\n/u sky/u <end_of_turn>/. \\n/- "
        "<start_of_turn>/. model/. \\n/. Ray/a leigh/a <end_of_turn>/. \\n/- <eos>/.",
        "gemma",
    )


def test_gemma_as_its_vocabulary_spells_it_and_a_message_that_begins_with_a_line_break():
    check("<start_of_turn>/. ▁user/. \\n\\n/. ▁Hi/u", "gemma")
    check("<start_of_turn>/. user/. <0x0A>/. ▁Hi/u", "gemma")


def test_chatml_with_system_user_assistant_and_a_tool():
    check(
        "<|im_start|>/. system/. \\n/. Be/s ~good/s <|im_end|>/. \\n/- <|im_start|>/. user/. \\n/. Hi/u <|im_end|>/. \\n/- "
        "<|im_start|>/. assistant/. \\n/. <think>/a hm/a </think>/a Yo/a <|im_end|>/. \\n/- "
        "<|im_start|>/. tool/. \\n/. 42/- <|im_end|>/. <|endoftext|>/. next/-",
        "chatml",
    )


def test_chatml_as_a_byte_level_vocabulary_spells_it():
    check("<|im_start|>/. user/. Ċ/. Hi/u Ġthere/u Ċ/u <|im_end|>/. Ċ/-", "chatml")


def test_llama3_headers_are_between_two_markers_and_the_break_after_them_is_the_formats():
    check(
        "<|begin_of_text|>/. <|start_header_id|>/. system/. <|end_header_id|>/. \\n\\n/. Cut/s ting/s <|eot_id|>/. "
        "<|start_header_id|>/. user/. <|end_header_id|>/. ĊĊ/. Hi/u ĊĊ/u there/u <|eot_id|>/. "
        "<|start_header_id|>/. assistant/. <|end_header_id|>/. \\n/. \\n/. <|python_tag|>/. run/a <|eom_id|>/. "
        "<|start_header_id|>/. ipython/. <|end_header_id|>/. \\n\\n/. 42/- <|eot_id|>/.",
        "llama3",
    )


def test_harmony_channels_belong_to_the_header_and_developer_ranks_as_system():
    check(
        "<|start|>/. system/. <|message|>/. You/s are/s <|end|>/. <|start|>/. developer/. <|message|>/. Rules/s <|end|>/. "
        "<|start|>/. user/. <|message|>/. Hi/u <|end|>/. "
        "<|start|>/. assistant/. <|channel|>/. analysis/. <|message|>/. Hm/a <|end|>/. "
        "<|start|>/. assistant/. <|channel|>/. comment/. ary/. ~to/. =/. functions/. .x/. <|constrain|>/. json/. <|message|>/. "
        "{}/a <|call|>/. <|start|>/. functions/. .x/. ~to/. =assistant/. <|channel|>/. commentary/. <|message|>/. 42/- <|end|>/. "
        "<|start|>/. assistant/. <|channel|>/. final/. <|message|>/. Yo/a <|return|>/.",
        "harmony",
    )


def test_a_row_that_starts_or_stops_in_the_middle():
    check("tail/- <end_of_turn>/. \\n/- <start_of_turn>/. mod/.", "gemma")


def test_an_unknown_speaker_and_an_empty_header_are_other():
    check("<|im_start|>/. narrator/. \\n/. Once/- <|im_start|>/. \\n/. upon/-", "chatml")


def test_special_tokens_stay_special_inside_a_message():
    check("<start_of_turn>/. user/. \\n/. see/u <unused99>/. this/u <eos>/.", "gemma", special={"<unused99>"})


def test_padding_is_a_run_at_either_end_only():
    check("<pad>/_ <pad>/_ <bos>/. hi/- <pad>/. yo/- <pad>/_", "gemma", pad="<pad>")
    eos = "<|endoftext|>"
    check(f"a/- {eos}/. b/- {eos}/_ {eos}/_", None, special={eos}, pad=eos)
    check(f"{eos}/_ {eos}/_", None, pad=eos)


def test_without_a_template_nobody_speaks():
    check("<s>/. Once/- upon/-", None, special={"<s>"})


@pytest.mark.parametrize(
    ("vocabulary", "template"),
    [
        ({"<bos>", "<start_of_turn>", "<end_of_turn>"}, "gemma"),
        ({"<|im_start|>", "<|im_end|>", "<|endoftext|>"}, "chatml"),
        ({"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}, "llama3"),
        ({"<|start|>", "<|message|>", "<|channel|>", "<|end|>"}, "harmony"),
        ({"<|start|>"}, None),
        ({"<|endoftext|>"}, None),
    ],
)
def test_a_template_is_known_by_its_tokens(vocabulary, template):
    assert detect_template(vocabulary) == template


def test_counts_and_proportions_leave_padding_out_of_the_shares():
    counts = count_roles(["user", "user", "special", "assistant", "pad", "pad"])
    assert counts == {"user": 2, "assistant": 1, "system": 0, "special": 1, "other": 0, "pad": 2, "total": 6}
    assert role_proportions(counts) == {"user": 0.5, "assistant": 0.25, "system": 0, "special": 0.25, "other": 0}
    assert set(role_proportions(count_roles(["pad"])).values()) == {None}
    assert set(TOKEN_ROLES) == set(SHORT.values())

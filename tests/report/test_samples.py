import numpy as np

from castalia.config.schema import TokenizerConfig
from castalia.data.indexed import open_dataset
from castalia.data.tokenizer import load_tokenizer
from castalia.report.held_out import HeldOut, HeldOutDocument
from castalia.report.samples import compared

BYTES = load_tokenizer(TokenizerConfig(kind="bytes"))


def test_a_memorised_sample_is_told_from_one_that_is_not(corpora):
    text = open_dataset(corpora[0])
    known = BYTES.decode(text[7][:230].tolist())
    held_out = HeldOut("words", (HeldOutDocument("words", np.arange(9), None, "some text"),), 1, 9, True)
    written = [(0.5, "", f"Thus: {known}"), (1.0, "", "Nothing of the kind.")]
    (copied, own), search = compared(written, [(text, None)], BYTES, held_out)
    assert copied.copied and copied.nearest.bytes >= 230
    assert known in copied.nearest.text and copied.nearest.source == "words, document 7"
    assert not own.copied
    assert search.tokens == search.of_tokens == len(text.tokens)

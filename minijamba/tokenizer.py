"""Text to token ids and back: raw bytes, or byte-level BPE. Both share the special tokens <pad> 0, <bos> 1 and <eos> 2.

Encoding adds no special token: whoever needs <bos> between documents or in front of a prompt puts it there.
"""

import json
from pathlib import Path

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


class StreamDecoder:
    """Turns ids into text one at a time and never prints half a character.

    A character of UTF-8 may be spread over several tokens: `add` returns "" until its last byte has come, and `finish`
    returns what is still held. The pieces joined are the text that `decode` gives for all the ids at once.

    >>> decoder = ByteTokenizer().stream()
    >>> [decoder.add(token) for token in ByteTokenizer().encode("aé")]
    ['a', '', 'é']
    """

    def __init__(self, decode):
        self._decode, self._printed, self._held = decode, [], []

    def add(self, token):
        self._held.append(token)
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # what a decoder puts where a character is cut short
            return ""
        self._printed, self._held = self._held, []
        return text

    def finish(self):
        text, self._held = self._text(), []
        return text

    def _text(self):
        # The ids printed last stay in front: some decoders drop the space that opens a text, which here is a real one.
        before = self._decode(self._printed)
        return self._decode(self._printed + self._held)[len(before):]


class ByteTokenizer:
    """One token a byte: id = byte + 3, after the three special tokens. Vocabulary 259, nothing to train or load."""

    vocab_size = len(SPECIAL_TOKENS) + 256

    def encode(self, text, special=False):
        """str -> list of ids, one for each byte of its UTF-8; special tokens have no spelling here."""
        return [byte + len(SPECIAL_TOKENS) for byte in text.encode("utf-8")]

    def decode(self, ids):
        """ids -> str, without special tokens; bytes that are no UTF-8 become the replacement character."""
        first = len(SPECIAL_TOKENS)
        utf8 = bytes(token - first for token in ids if first <= token < self.vocab_size)
        return utf8.decode("utf-8", errors="replace")

    def stream(self):
        return StreamDecoder(self.decode)


class BPETokenizer:
    """Byte-pair encoding over bytes, held by the `tokenizers` library and stored as its tokenizer.json.

    Reads any byte-level or byte-fallback tokenizer.json, those of the released Jamba checkpoints included.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts, vocab_size, progress=False):
        """Learns up to `vocab_size` tokens (at least 259) from an iterable of str; fewer where no pair comes twice.

        Each digit stays a token of its own, so that a number is read place by place. The same texts give the same
        tokenizer. Raises ValueError if the bytes and special tokens alone do not fit.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        smallest = ByteTokenizer.vocab_size
        if vocab_size < smallest:
            raise ValueError(f"vocab_size {vocab_size} is below {smallest}: 256 bytes and 3 special tokens must fit")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=progress,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path):
        """Reads tokenizer.json, given the file or its folder."""
        from tokenizers import Tokenizer

        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}: give a tokenizer.json or the folder that holds one")
        try:
            return cls(Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises a bare Exception whatever went wrong
            raise ValueError(f"{file} is not a tokenizer.json that the tokenizers library reads: {error}") from error

    def save(self, folder):
        """Writes tokenizer.json, which transformers loads, too, into the folder, which is made if absent."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(Path(folder) / "tokenizer.json"))
        # What transformers' AutoTokenizer needs beside it.
        roles = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, "clean_up_tokenization_spaces": False}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @property
    def vocab_size(self):
        return self._tokenizer.get_vocab_size()

    def encode(self, text, special=False):
        """str -> list of ids. With `special`, "<bos>" in the text is that token; otherwise it is five characters."""
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """ids -> str, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self):
        return StreamDecoder(self.decode)


def load_tokenizer(folder):
    """The tokenizer beside a checkpoint: its tokenizer.json, or bytes where the folder has none."""
    return BPETokenizer.load(folder) if (Path(folder) / "tokenizer.json").is_file() else ByteTokenizer()

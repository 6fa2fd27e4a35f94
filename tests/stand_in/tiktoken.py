"""Replaces tiktoken in the tests, because tiktoken downloads its files. Each byte is a token. Tokens from 256 on decode
to pairs of bytes, but no text encodes to them. 50256 is GPT-2's end-of-text token."""

END = "<|endoftext|>"


class Encoding:
    def encode(self, text, allowed_special=()):
        parts = text.split(END) if allowed_special else [text]
        ids = [list(part.encode()) for part in parts]
        return ids[0] + [i for part in ids[1:] for i in (50256, *part)]

    def encode_ordinary_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids):
        return b"".join(
            bytes([i]) if i < 256 else END.encode() if i == 50256 else bytes(divmod(i - 256, 256)) for i in ids
        )


def get_encoding(name):
    assert name == "gpt2"
    return Encoding()

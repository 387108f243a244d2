"""Read a `tokenizer.json` for tiktoken. What tiktoken cannot do in exactly the same way is refused by name.

tiktoken splits text into the matches of a regular expression. A piece that is a token becomes that token; in any other
piece, the two neighbours that together are the token of the smallest id are merged, again and again. The `tokenizers`
library instead has an ordered list of merges, and several steps before them. The functions below check that both give
the same ids for every text, and their docstrings say why the checks suffice.
"""

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

# GPT-2's pieces: contractions, words, numbers, other characters, white space (Radford et al. 2019).
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The pieces of Llama 3 and GPT-4. Qwen 2 splits numbers into single digits.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")

# The regular expressions that mean the same in Oniguruma (the library's engine) and in fancy-regex (tiktoken's).
# Excluded are `^ $ . \w \b`, `+` or `?` after `{m,n}`, set operations, and most of `(?i:`: in Oniguruma ß matches ss.
ESCAPE = r"\\(?:[rntsSdD]|[pP]\{(?:L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?)\}|[!-&(-/:;=?@\[-_{-~])"
SIGN = r"[^\\\[\]&~^-]"
CLASS = rf"\[\^?(?:{ESCAPE}|{SIGN}(?:-{SIGN})?)+\]"
SUFFIX = r"'?(?:\[[sdmt]+\]|[sdmt]|ll|ve|re)"
ATOM = rf"(?:{ESCAPE}|{CLASS}|\(\?i:{SUFFIX}(?:\|{SUFFIX})*\)|[^\\()\[\]{{}}|*+?.^$])"
TIMES = r"(?:[*+?][+?]?|\{\d+(?:,\d*)?\}(?![+?]))"
COMMON = re.compile(rf"(?:\((?:\?[:!=])?|\||(?:{ATOM}|\)){TIMES}?)+")
PARTS = re.compile(rf"(?P<atom>{ATOM})|(?P<look>\(\?[!=])|\(\?:|{TIMES}|.", re.DOTALL)
GROUP = re.compile(r"\((?:\?[:!=])?([^()]*)\)([*+]|\{\d+,\})?")

ANY = object()
BYTES = {bytes([byte]) for byte in range(256)}
UTF8_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]  # GPT-NeoX's vocabulary has no others


def byte_characters() -> dict[str, int]:
    """GPT-2 writes each byte as one visible character: the byte of each such character."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def read_tokenizer_json(file: Path) -> dict[str, Any]:
    """The arguments of `Tokenizer` for a byte-level BPE in the format of the `tokenizers` library.

    Raises ValueError saying in one sentence what in the file is unsupported, unknown or contradictory.
    """
    content = file.read_bytes()
    try:
        description = json.loads(content)
        vocabulary, merges = description["model"]["vocab"], description["model"]["merges"]
        if not isinstance(vocabulary, dict) or not isinstance(merges, list):
            raise TypeError("vocab is no object, or merges no list")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not a BPE tokenizer.json: {error!r}") from error
    try:
        steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens")
        _check("it", description, version=["1.0"], truncation=[None], padding=[None], **dict.fromkeys(steps, ANY))
        _check_model(description["model"])
        _check_outer_steps(description.get("post_processor"), description.get("decoder"))
        nfc = _is_nfc(description.get("normalizer"))
        pattern = _split_pattern(description.get("pre_tokenizer"))
        added = _added_tokens(description.get("added_tokens", []), vocabulary)
        eot = next((name for name in END_OF_TEXT if name in added), None)
        if eot is None:
            raise ValueError(f"no end-of-text token; one of {', '.join(END_OF_TEXT)} must be an added token")
        if not added[eot].get("special"):
            raise ValueError(f"the end-of-text token {eot!r} is not special, so that text could hold it")
        # Text never yields special tokens; the other added tokens are matched in the text before the merging.
        special = {name.encode(): token["id"] for name, token in added.items() if token.get("special")}
        for name, other in itertools.product(added, added):
            if name.encode() in special and other.encode() not in special and _begins_inside(other, name):
                raise ValueError(f"the added token {other!r} can begin inside the special token {name!r}")
        tokens, pairs = _in_bytes(vocabulary, merges, added)
        for token in special.keys() & {a + b for a, b in pairs} | {token for token in special if len(token) == 1}:
            raise ValueError(f"the special token {token.decode()!r} comes out of merging, so that text could hold it")
        plain = {token: i for token, i in tokens.items() if token not in special}
        ranks = _ranks(plain, pairs, bool(description["model"].get("ignore_merges")))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return {
        "name": str(file),
        "identity": "sha256:" + hashlib.sha256(content).hexdigest(),
        "ranks": ranks,
        "eot_id": added[eot]["id"],
        "extra": {name.encode(): token["id"] for name, token in added.items() if name.encode() not in special},
        "raw": {name.encode() for name, token in added.items() if not token.get("normalized")},
        "unused": {token: i for token, i in tokens.items() if token not in ranks} | special,
        "pattern": pattern,
        "nfc": nfc,
        "file": file,
    }


def _check(name: str, given: Any, **known: Any) -> None:
    """Raise ValueError unless `given` is an object with only `known` keys, and each value is in the list of its key."""
    if not isinstance(given, dict):
        raise ValueError(f"{name} is {_show(given)}, not an object")
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{name} has the key {key!r}, which is not known here")
        if known[key] is not ANY and value not in known[key]:
            choices = " or ".join(map(_show, known[key]))
            raise ValueError(f"{name} has {key} {_show(value)}, which is not supported; {choices} is")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else text[:77] + "..."


def _check_model(model: dict) -> None:
    """Settings for unknown tokens are ignored: no text has any, because every byte of UTF-8 is a token."""
    _check(
        "the model",
        model,
        type=["BPE"],
        dropout=[None, 0.0],
        continuing_subword_prefix=[None, ""],
        end_of_word_suffix=[None, ""],
        ignore_merges=[False, True],
        **dict.fromkeys(("unk_token", "fuse_unk", "byte_fallback", "vocab", "merges"), ANY),
    )


def _check_outer_steps(processor: Any, decoder: Any) -> None:
    """Check the steps after the merging. Those that add special tokens around a text are ignored, as `encode` does."""
    level = {"add_prefix_space": ANY, "trim_offsets": ANY, "use_regex": ANY}
    if decoder is not None:
        _check("the decoder", decoder, type=["ByteLevel"], **level)
    steps = _steps(processor, "processors")
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "TemplateProcessing":
            _check("the post_processor", step, type=ANY, single=ANY, pair=ANY, special_tokens=ANY)
            single = step.get("single")
            text = json.dumps(single, sort_keys=True)
            if not isinstance(single, list) or text.count('"Sequence"') != 1 or '"Sequence": {"id": "A"' not in text:
                raise ValueError(f"the post_processor has single {_show(single)}, which is not the text once")
        elif kind == "RobertaProcessing":
            _check("the post_processor", step, type=ANY, sep=ANY, cls=ANY, trim_offsets=ANY, add_prefix_space=ANY)
        else:
            _check("the post_processor", step, type=["ByteLevel", "TemplateProcessing", "RobertaProcessing"], **level)


def _steps(rule: Any, key: str) -> list:
    """The steps of `rule`, which is null, one step, or a Sequence that lists them at `key`."""
    if isinstance(rule, dict) and rule.get("type") == "Sequence" and isinstance(rule.get(key), list):
        _check("the Sequence", rule, type=ANY, **{key: ANY})
        return rule[key]
    return [] if rule is None else [rule]


def _is_nfc(normalizer: Any) -> bool:
    steps = _steps(normalizer, "normalizers")
    for step in steps:
        if not isinstance(step, dict) or step.get("type") != "NFC":
            kind = step.get("type") if isinstance(step, dict) else _show(step)
            raise ValueError(f"normalizer {kind} is not supported; none or NFC is")
        _check("the normalizer", step, type=ANY)
    return bool(steps)


def _split_pattern(rule: Any) -> str:
    """The regular expression whose matches are the pieces, for ByteLevel alone, or one Split and then ByteLevel.

    With the behavior Isolated, text between two matches is a piece, too. With Removed and `invert` it is dropped, as in
    tiktoken.
    """
    steps = _steps(rule, "pretokenizers")
    kinds = [step.get("type") if isinstance(step, dict) else step for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(f"this pre_tokenizer is not supported: {_show(kinds)}; ByteLevel is, alone or after one Split")
    split, level = steps[0], steps[-1]
    use_regex = [True, False] if split is level else [False]
    level = {"use_regex": True, **level}
    _check("ByteLevel", level, type=ANY, add_prefix_space=[False], trim_offsets=ANY, use_regex=use_regex)
    if len(steps) == 1:
        return GPT2_SPLIT if level["use_regex"] else r"[\s\S]+"
    _check("the Split", split, type=ANY, pattern=ANY, behavior=["Isolated", "Removed"], invert=[False, True])
    if split.get("behavior") == "Removed" and not split.get("invert"):
        raise ValueError("the Split has behavior Removed without invert, which drops what it matches")
    _check("the pattern of the Split", split.get("pattern"), Regex=ANY)
    pattern = split["pattern"].get("Regex")
    why = None
    if not isinstance(pattern, str) or not COMMON.fullmatch(pattern):
        why = "holds what tiktoken's regular expressions may read otherwise"
    elif _matches_nothing(pattern):
        why = "can match the empty string"
    elif _may_take_forever(pattern):
        why = "repeats what can match in several ways"
    if why:
        raise ValueError(f"the Split has the pattern {_show(pattern)}, which {why}")
    if split.get("behavior") == "Removed" or pattern in (GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT):
        return pattern
    one_class = re.fullmatch(rf"({ESCAPE})(?:\+|\{{1,\d+\}})?", pattern)
    return rf"{pattern}|[^{one_class[1]}]+" if one_class else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def _matches_nothing(pattern: str) -> bool:
    """Whether a match may be empty. Python's `re` decides, with x for an atom and an optional group for a lookahead."""
    signs = PARTS.sub(lambda m: "x" if m["atom"] else "(?:|" if m["look"] else m[0], pattern)
    try:
        return re.fullmatch(signs, "") is not None
    except (re.error, OverflowError) as error:
        raise ValueError(f"the Split has the pattern {_show(pattern)}, which cannot be read: {error}") from None


def _may_take_forever(pattern: str) -> bool:
    """Whether a repeated group contains a repetition or a choice. The library gives up if these match in many ways."""
    signs = PARTS.sub(lambda m: "x" if m["atom"] else m[0], pattern)
    while group := GROUP.search(signs):  # from the inside out
        if group[2] and re.search(r"[*+|]|,\}", group[1]):
            return True
        signs = signs[: group.start()] + group[1] + (group[2] or "") + signs[group.end() :]
    return False


def _added_tokens(tokens: Any, vocabulary: dict[str, int]) -> dict[str, dict]:
    """The added tokens by content. The library gives them their id in the vocabulary, else the next free one, whatever
    the file says. Raises ValueError if the file says another id."""
    if not isinstance(tokens, list):
        raise ValueError(f"added_tokens is {_show(tokens)}, not a list")
    added: dict[str, dict] = {}
    for token in tokens:
        flags = {key: [False, True] for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        _check("an added token", token, id=ANY, content=ANY, **flags)
        content, i = token.get("content"), token.get("id")
        if not isinstance(content, str) or not content or content in added:
            raise ValueError(f"the added token {_show(content)} is empty, no string, or there twice")
        last = max((other["id"] for other in added.values()), default=-1)
        due = vocabulary.get(content, max(last + 1, len(vocabulary)))
        if type(i) is not int or i != due:
            raise ValueError(f"the added token {content!r} has the id {_show(i)}, and the library gives it {due}")
        strips = [key for key in ("single_word", "lstrip", "rstrip") if token.get(key)]
        if strips and not token.get("special"):
            raise ValueError(f"the added token {content!r} has {strips[0]} true, which is not supported")
        added[content] = token
    return added


def _begins_inside(token: str, special: str) -> bool:
    """Whether `token` could match from a character inside `special` on. The library skips special tokens as a whole."""
    return any(special[i:].startswith(token) or (i and token.startswith(special[i:])) for i in range(len(special)))


def _in_bytes(
    vocabulary: dict[str, int], merges: list, added: dict[str, dict]
) -> tuple[dict[bytes, int], dict[tuple[bytes, bytes], int]]:
    """The vocabulary, and the position of each pair in the merges, with bytes instead of visible characters."""
    characters = byte_characters()
    written: dict[str, bytes] = {}
    owners: dict[int, str] = {}
    for text, i in [*vocabulary.items(), *((name, token["id"]) for name, token in added.items())]:
        if type(i) is not int or not 0 <= i < 2**32 or owners.setdefault(i, text) != text:
            also = f", as has {owners[i]!r}" if type(i) is int and i in owners else ""
            raise ValueError(f"the token {text!r} has the id {_show(i)}{also}, which is not supported")
        if text not in vocabulary or (text in added and not characters.keys() >= set(text)):
            continue
        try:
            token = bytes(map(characters.__getitem__, text))
        except KeyError as error:
            raise ValueError(f"it is not byte-level: its vocabulary holds the character {error.args[0]!r}") from None
        if text in added and token != text.encode():
            raise ValueError(f"the added token {text!r} is how the vocabulary writes the bytes {token!r}")
        written[text] = token
    tokens = {token: vocabulary[text] for text, token in written.items()}
    missing = [f"0x{byte:02X}" for byte in UTF8_BYTES if bytes([byte]) not in tokens]
    if missing:
        raise ValueError(f"the vocabulary lacks the bytes {', '.join(missing)}: text that holds them has no ids")
    pairs: dict[tuple[bytes, bytes], int] = {}
    for place, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        try:
            a, b = (written[part] for part in parts)
            known = a + b in tokens
        except (TypeError, ValueError, KeyError):
            known = False
        if not known:
            raise ValueError(f"the merge {_show(merge)} is not of two tokens of the vocabulary that make a third")
        pairs[a, b] = place
    return tokens, pairs


def _ranks(tokens: dict[bytes, int], pairs: dict[tuple[bytes, bytes], int], whole: bool) -> dict[bytes, int]:
    """The ids that tiktoken needs: of the tokens that merging makes, and with `whole` (ignore_merges) of all others,
    because a piece may equal one.

    tiktoken merges any two neighbours that make a token, the library only the pairs in its list. But the bytes of a
    token merge in one order, whatever text is around them, so its last merge is always of the same pair. If the list
    has this pair for each token, and has these pairs in the order of the tokens' ids, both make the same merges in the
    same order. This holds for files that were trained, and for those written from tiktoken's (Llama 3).
    """
    known = tokens if whole else {token: tokens[token] for token in {a + b for a, b in pairs} | BYTES & tokens.keys()}
    ranks: dict[bytes, int] = {}
    last = -1
    for token, i in sorted(known.items(), key=lambda item: item[1]):
        parts = merge_bytes(token, known)
        if len(parts) == 2:
            place = pairs.get((parts[0], parts[1]), -1)
            if place <= last:
                wrong = "is not in the order of the ids" if place >= 0 else "is missing"
                raise ValueError(f"in its merges the one that makes {token!r} {wrong}, which is not supported")
            last = place
        if len(parts) < 3 or whole:
            ranks[token] = i
    return ranks


def merge_bytes(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Merge bytes, smallest rank first, until two parts are left or no two neighbours make a token of `ranks`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min((ranks.get(a + b, 2**32), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank == 2**32:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts

"""Whether a GGUF file is read as others read it: the same token ids on every text, and logits within 1e-3.

    python benchmarks/nano/gguf_agrees.py --corpus ../shared/corpus --file MODEL.gguf --peer transformers
    python benchmarks/nano/gguf_agrees.py --corpus ../shared/corpus --file MODEL.gguf --peer http://127.0.0.1:8080

The peer is transformers 5 with gguf, which reads files of the architecture llama but none of granite, or the address of a
running llama-server of llama.cpp with the same file. Logits are compared with transformers alone.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers_agree import texts

from mpo_runtime.loading import load_network, read_text_files
from mpo_runtime.measure import piecewise_logits
from mpo_runtime.weights.gguf import Gguf

# Article 1 of the Universal Declaration of Human Rights, and characters that tokenizers cut in odd ways.
MULTILINGUAL = [
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.",
    "Minden emberi lény szabadon születik és egyenlő méltósága és joga van.",
    "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Всі люди народжуються вільними і рівними у своїй гідності та правах.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ ու իրավունքներով։",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "人人生而自由，在尊严和权利上一律平等。",
    "人人生而自由﹐在尊嚴和權利上一律平等。",
    "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "የሰው ልጅ ሁሉ ሲወለድ ነፃና በክብርና በመብትም እኩልነት ያለው ነው።",
    "I'VE We'll they'D it’s o'clock ’tis don't DON'T",
    "1 12 123 1234 12345 3.14159 1,000,000 ½ ² ③ Ⅳ ٣٤ ४५ 0x1F -7",
    "a\u0301e\u0308 \u212b \ufb01 \u200b zero\u200dwidth \u00a0nbsp\u00a0 \u3000wide \u2028line",
    "🙂👍🏽👨‍👩‍👧‍👦🇫🇷 ✈️ ♥ → ∑∫√ ≤≥ €£¥ ©®™",
    "\n\n\n a\n \n  b\r\n\r\nc\t\td   \n",
    "x = {'a': [1, 2], \"b\": None}  # ok?\n\tif x != y && z: return -1;\n",
    "https://example.org/a_b?c=1&d=%20#e  me@example.org  C++ C# .NET",
    "AAAAAAAAAAAAAAAAAAAAAAA aaaaaaaaaaaaaaaaa !!!!!!!!!!!! ........ ------------ ====",
    "",
    " ",
    "   ",
    "\n",
    "é",
]
Encode = Callable[[str], list[int]]


def transformers_encoder(file: Path) -> Encode:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def server_encoder(address: str) -> Encode:
    def encode(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return list(json.load(answer)["tokens"])

    return encode


def compare_logits(file: Path, ids: np.ndarray) -> float:
    """The largest difference of a logit between transformers' reading of the file and ours, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.load_state_dict(load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"], strict=False)
    model.tie_weights()
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    largest = 0.0
    for backend in ("reference", "native"):
        network = load_network(Gguf(file), backend=backend)
        ours = np.concatenate(list(piecewise_logits(network, ids, 512)))
        difference = float(np.abs(ours - expected[: len(ours)]).max())
        print(
            f"{backend}: logits of {len(ours)} tokens differ by at most {difference:.2e} of {np.abs(expected).max():.1f}"
        )
        largest = max(largest, difference)
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--peer", required=True, help="transformers, or the address of a llama-server")
    arguments = parser.parse_args()
    tokenizer, _ = read_text_files(Gguf(arguments.file))
    with_transformers = arguments.peer == "transformers"
    encode = transformers_encoder(arguments.file) if with_transformers else server_encoder(arguments.peer)
    found = [*MULTILINGUAL, *texts(arguments.corpus)]
    ours = [tokenizer.encode(text, parse_special=True) for text in found]
    differing = [text for text, ids in zip(found, ours, strict=True) if encode(text) != ids]
    print(f"{arguments.peer}: {len(found)} texts, {len(differing)} with other ids")
    for text in differing[:5]:
        print(f"  {text[:60]!r}: {tokenizer.encode(text, parse_special=True)[:20]}, theirs {encode(text)[:20]}")
    worst = compare_logits(arguments.file, np.array(ours[len(MULTILINGUAL) + 5][:256])) if with_transformers else 0.0
    if differing or worst >= 1e-3:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

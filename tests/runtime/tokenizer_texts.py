"""Texts to compare tokenizers on: of many scripts and awkward ones, and the begins of the embedded texts."""

from __future__ import annotations

import json
import random
import unicodedata
from functools import cache
from pathlib import Path

SENTENCES = {
    "English": "We'll fix it, I'm sure; they've said so. IT'S HERE, HE'D SAY, and don’t ask.",
    "German": "Die Größe des Gefäßes ließ sich übrigens nicht ändern.",
    "French": "Où l’été s’achève, l'œuvre naïve déçoit-elle ? C'est « ça ».",
    "Spanish": "¿Cuántos años tenías? ¡Más de ochenta, señor!",
    "Polish": "Zażółć gęślą jaźń, proszę o świeżą kawę.",
    "Czech": "Příliš žluťoučký kůň pil vodu z řeky.",
    "Turkish": "Istanbul’da İyi ıslak ağaçlar şimdi çiçek açtı.",
    "Vietnamese": "Buổi sáng ở đây rất mát, chúng tôi uống trà và kể chuyện.",
    "Greek": "Το πρωί πίνουμε καφέ· ΌΛΟΙ μαζί, πώς;",
    "Russian": "Сегодня ёжик нашёл 15 грибов; «хорошо», сказал он.",
    "Ukrainian": "Її м’яч лежить під деревом, а ґава дивиться.",
    "Armenian": "Առավոտյան մենք թեյ ենք խմում։",
    "Georgian": "დილით ჩვენ ჩაის ვსვამთ და ვსაუბრობთ.",
    "Hebrew": "בבוקר אנחנו שותים תה, וְאָז הוֹלְכִים הביתה.",
    "Arabic": "في الصباح نشرب الشاي، ثمّ نكتبُ ٣ رسائل؟ لا.",
    "Persian": "صبح‌ها چای می‌خوریم و ۱۲ نامه می‌نویسیم.",
    "Urdu": "صبح ہم چائے پیتے ہیں اور ۵ خط لکھتے ہیں۔",
    "Hindi": "सुबह हम चाय पीते हैं और १२ चिट्ठियाँ लिखते हैं।",
    "Bengali": "সকালে আমরা চা খাই এবং ৩টি চিঠি লিখি।",
    "Tamil": "காலையில் நாங்கள் தேநீர் குடிக்கிறோம், ௩ கடிதம்.",
    "Telugu": "ఉదయం మేము టీ తాగుతాము.",
    "Kannada": "ಬೆಳಿಗ್ಗೆ ನಾವು ಚಹಾ ಕುಡಿಯುತ್ತೇವೆ.",
    "Malayalam": "രാവിലെ ഞങ്ങൾ ചായ കുടിക്കും.",
    "Sinhala": "උදේට අපි තේ බොමු.",
    "Thai": "ตอนเช้าเราดื่มน้ำชาแล้วเขียนจดหมาย ๗ ฉบับ",
    "Lao": "ຕອນເຊົ້າພວກເຮົາດື່ມນ້ຳຊາ ໕ ຈອກ",
    "Burmese": "မနက်ခင်းမှာ လက်ဖက်ရည် သောက်တယ်။",
    "Khmer": "ព្រឹកនេះយើងផឹកតែ ៥ ពែង។",
    "Tibetan": "ཞོགས་པར་ང་ཚོས་ཇ་འཐུང་།",
    "Amharic": "ጠዋት ሻይ እንጠጣለን። ፲፪ ደብዳቤ።",
    "Cherokee": "ᏌᎴᏊ ᎣᎩᏗᏔᏍᎪᎢ",
    "Mongolian": "ᠥᠷᠯᠥᠭᠡ ᠴᠠᠢ ᠤᠤᠨ᠎ᠠ",
    "Chinese": "早上我们喝茶，然后写了三封信（一共２００字）。",
    "Traditional Chinese": "早晨我們喝茶，後來寫了「長信」……",
    "Japanese": "朝はお茶を飲んで、ﾃｶﾞﾐを３通書いた。パーティーは？",
    "Korean": "아침에 우리는 차를 마시고 편지를 3통 썼다. ㅋㅋㅋ",
    "rare Han": "𠀀𠮷野家𪚥 㐀㐁 ⿰木木 〇々〆",
    "old scripts": "𒀀𒁀 𓀀𓂀 𐌰𐌱𐌲 𐤀𐤁 𐐷𐐸 𝔞𝔟 𝟎𝟏𝟐",
}
SINGLE = [
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", "\t\t", " \n", "\n ", "\n \n", " \n\n ", "\x00", "a\x00b",
    "\ufeff", "\ufeffa", "\u00a0", "\u200b", "\u200d", "\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u3000",
    "\u1680", "\u180e", "\u202f", "\u205f", "\ufffd", "\U0010ffff", "\ue000", "\u0378", "▁", "▁▁", " ▁", "▁ a", "a▁b",
    "Ġ", "Ċ", "ĠĠa", "'", "''", "'s", "'S", " 's", "s's", "'ſ", "x'ſ", "it’s", "'LL", "'ll'll", "'re've", "o'K", "'d1",
    "a'", "1's", "\n's", ".'t", " '", "' t", "!", "!!", " !", "! ", "!\n", "!\r\n\n", " !\n a", "...\n\n...", "a.b.c",
    "a  b", "a   b", "a\n\nb", "a \n b", "a\t b", "a \tb", "a\r\n\r\nb", "a\rb", " a", "  a", "   a", "\na", "\n\na",
    "\ta", "\t a", " \ta", "a ", "a  ", "a\n", "a \n", "0", "00", "000", "0000", "00000", " 0", "  00", "a0", "0a",
    "1,234.50", "1 234", "-5", "+5", "5%", "$5", "€5", "x²", "x₂", "½", "⅓1", "Ⅷ", "ⅷ", "①②", "㊿", "٣٤", "१२३४",
    "๑๒๓", "１２３", "𝟙𝟚", "৴", "一二三", "༳", "꩐꩑", "𞥐", "1٣", "٣1", "1½", "½½", "²³", "❶", "〇〡",
    "ªº", "ʰ", "ǅ", "ß", "ẞ", "ﬁ", "ĳ", "Å", "K", "µ", "μ", "İ", "ı", "ſ",
    "<s>", "</s>", "<unk>", "<0x0A>", "<0x00><0xFF>", "<|endoftext|>", "<|im_start|>", "<|eot_id|>", "<|", "|>", "<|>",
    "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n", "<|end_of_text|><|end_of_text|> a <|tool_call|>",
    "[INST] a [/INST]", "<<SYS>>", "<|im_start|>user\nHi<|im_end|>\n", "a<|im_end|>b", "<| im_end |>",
    "\u0301", "a\u0301", "e\u0301\u0323", "\u0301a", " \u0301", "1\u0301", "!\u0301", "\u0301\u0302\u0303",
    "क्षि", "क्‍ष", "நி", "ก็", "가", "\u1112\u1161\u11ab", "\u0627\u064b", "\u05e9\u05c1\u05b8", "\u0f40\u0fb5",
    "🙂", "🙂🙂", " 🙂", "🙂 ", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "1️⃣", "©️", "☺", "☺️", "♥♥", "🧑🏿‍🚀🚀", "🫠🪿", "a🙂b",
    "→←", "≤≥", "∑∫", "─│┌", "█▓", "•", "…", "“a”", "‘a’", "«a»", "„a“", "—", "–", "‑", "‒", "·", "、", "。", "！？",
    "http://example.org/a_b?c=1&d=%20#e", "me@example.org", "C:\\a\\b", "/usr/bin", "#tag", "@name", "a/b", "a_b", "_a",
    "__init__", "camelCase", "snake_case_name", "SHOUTING", "McDonald", "x1y2z3", "v1.2.3-rc1", "0xFFFF", "1e-05",
    "1_000_000", "a=b", "a==b", "a!=b", "a->b", "a::b", "a?.b", "=>", "<=", "&&", "||", "++i", "**", "//", "/* */", "```",
]  # fmt: skip
CODE = [
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # 3\n",
    "class A:\n\tdef __init__(self):\n\t\tself.x = [i**2 for i in range(10)]\n",
    "for (int i = 0; i < 10; ++i) {\n        sum += a[i] * b[i];\n}\n",
    "fn main() -> Result<(), String> {\r\n\tlet x = vec![1u8; 1024];\r\n}\r\n",
    "SELECT name, COUNT(*) FROM t WHERE x >= 10.5 GROUP BY name;",
    '{"a": [1, 2.50, null], "b": {"c": "\\u00e9\\n"}}',
    "<div class=\"a b\">\n  <a href='#'>x</a>\n</div>",
    "#!/bin/sh\nset -e\necho \"$HOME/${1:-x}\" | sed 's/a/b/g' > /dev/null\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n- [ ] one\n- [x] two\n",
    "\\begin{equation}\n  \\frac{1}{2}\\sum_{i=1}^{n} x_i^2\n\\end{equation}",
    "const f = async (x) => { await g(`${x}`); };",
    "- 1\n  - 2\n      - 3\n\n\n\n# 4\n",
]
PIECES = [
    *"aZéß ñ1٣½日本語カ가กा\u0301\u200d\u200b🙂\n\r\t'’.,!-_<>|▁",
    *("  ", "\n\n", "\r\n", " the", "ing", "'s", "'LL", "123", " \n", "\u00a0", "\u3000", "...", "<s>", "<0x41>", "क्ष"),
]


@cache
def awkward() -> tuple[str, ...]:
    """About 1000 texts: 38 languages in three spellings, pieces of them, runs, code, single cases, random mixtures."""
    found = [*SENTENCES.values(), *SINGLE, *CODE]
    for sentence in SENTENCES.values():
        found += [unicodedata.normalize(form, sentence) for form in ("NFD", "NFC", "NFKC")]
        found += [f" {sentence}\n\n{sentence}", sentence.upper(), sentence.replace(" ", "")]
        found += [sentence[start : start + 7] for start in range(0, len(sentence), 7)]
    for size in (2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100, 127, 1000):
        found += [
            letter * size for letter in (" ", "\n", "\t", "a", "A", "0", "=", "-", "é", "日", "🙂", "\u0301", " a")
        ]
        found += [f"x{' ' * size}y", f"{' ' * size}x", f"x\n{' ' * size}", f"\n{' ' * size}\n", f"{' ' * size}\t1"]
    found += [chr(code) for code in range(1, 256)]
    found += [f"a{chr(code)}b" for code in (*range(1, 32), *range(127, 161))]
    chosen = random.Random(0)
    found += ["".join(chosen.choices(PIECES, k=chosen.randint(2, 30))) for _ in range(400)]
    return tuple(dict.fromkeys(found))


def begins(folder: Path, rows: int = 650) -> list[str]:
    """The begins of that many embedded texts; of a conversation, its messages one after the other."""
    found = []
    for line in (folder / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()[:rows]:
        row = json.loads(line)
        found.append((row.get("text") or "\n\n".join(message["content"] for message in row["messages"]))[:1500])
    return found

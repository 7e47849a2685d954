//! Rows for a first try, made from a small grammar of our own: an attribute list of a garment, and a short text that names each attribute in
//! a fixed way. So there is something to learn, from few characters, and nothing foreign is shipped.
//!
//! There are two kinds of text over the same lists, so that a model can be trained on one and tuned to the other.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::Path;

use super::DataError;
use super::cache::write_atomically;
use crate::rng::{KeyedRng, Stream};

/// File names that [`write_demo`] writes.
pub const TRAIN_FILE: &str = "train.jsonl";
pub const DEV_FILE: &str = "dev.jsonl";

/// A garment: its name in the list, its name in the advert, and the attributes that only it has.
struct Garment {
    kind: &'static str,
    name: &'static str,
    own: [Attribute; 2],
}

/// An attribute: key, values, and the sentence about it, where `{}` is the value.
struct Attribute {
    key: &'static str,
    values: &'static [&'static str],
    sentence: &'static str,
}

const GARMENTS: &[Garment] = &[
    Garment {
        kind: "裤",
        name: "长裤",
        own: [
            Attribute { key: "裤型", values: &["直筒裤", "阔腿裤", "小脚裤", "工装裤"], sentence: "{}的剪裁拉长双腿" },
            Attribute { key: "裤腰型", values: &["高腰", "中腰", "松紧腰"], sentence: "{}设计贴合腰身" },
        ],
    },
    Garment {
        kind: "裙",
        name: "裙子",
        own: [
            Attribute {
                key: "裙型", values: &["百褶裙", "直筒裙", "蓬蓬裙", "鱼尾裙"], sentence: "{}的线条随步伐摆动"
            },
            Attribute { key: "裙长", values: &["短裙", "中长裙", "长裙"], sentence: "{}的长度刚刚好" },
        ],
    },
    Garment {
        kind: "上衣",
        name: "上衣",
        own: [
            Attribute { key: "衣样式", values: &["衬衫", "卫衣", "毛衣", "外套"], sentence: "{}的样式四季都能穿" },
            Attribute { key: "衣领型", values: &["圆领", "翻领", "立领"], sentence: "{}修饰颈部" },
        ],
    },
    Garment {
        kind: "鞋",
        name: "鞋子",
        own: [
            Attribute { key: "鞋跟", values: &["平跟", "中跟", "高跟", "厚底"], sentence: "{}走路很稳" },
            Attribute { key: "鞋头", values: &["圆头", "方头", "尖头"], sentence: "{}不挤脚" },
        ],
    },
];

const COMMON: &[Attribute] = &[
    Attribute { key: "版型", values: &["宽松", "修身", "显瘦", "合体"], sentence: "{}的版型穿着舒服" },
    Attribute {
        key: "材质", values: &["棉", "麻", "羊毛", "真丝", "牛仔", "皮革", "针织", "雪纺"], sentence: "{}面料手感柔软"
    },
    Attribute {
        key: "颜色",
        values: &["黑色", "白色", "红色", "蓝色", "绿色", "灰色", "米色", "粉色", "黄色", "紫色"],
        sentence: "{}让人眼前一亮",
    },
    Attribute {
        key: "风格", values: &["简约", "复古", "街头", "文艺", "清新", "优雅", "休闲", "运动"], sentence: "带着{}的气息"
    },
    Attribute {
        key: "图案", values: &["条纹", "格子", "印花", "碎花", "波点", "字母", "纯色", "刺绣"], sentence: "{}图案很有特色"
    },
    Attribute { key: "季节", values: &["春季", "夏季", "秋季", "冬季"], sentence: "适合{}" },
    Attribute { key: "场合", values: &["上班", "约会", "旅行", "聚会", "居家"], sentence: "{}时穿正合适" },
];

const ENDINGS: &[&str] = &["值得拥有", "怎么搭配都好看", "送给自己或朋友都好", "一件就够"];

/// What is written about an attribute list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DemoKind {
    /// A sentence an attribute and an ending: `这款长裤，宽松的版型穿着舒服，适合春季，值得拥有。`
    #[default]
    Advert,
    /// What a shop answers to the question when it is worn, season and occasion alone: `这款长裤，适合春季，约会时穿正合适。`
    Answer,
}

/// What an answer is about.
const WHEN: [&str; 2] = ["季节", "场合"];
/// The answer where the list has neither; one of [`ENDINGS`].
const ANY_TIME: &str = "怎么搭配都好看";

/// Chance of each attribute to be in a row, in tenths.
const TENTHS: u32 = 7;

/// Row `index` of the endless list of rows of `seed`: (content, summary). Its content does not depend on `kind`.
fn demo_row(kind: DemoKind, seed: u64, index: u64) -> (String, String) {
    let rng = KeyedRng::new(seed, Stream::DemoData, index);
    let mut drawn = 0;
    let mut below = |bound: usize| {
        drawn += 1;
        rng.below(drawn - 1, bound as u32) as usize
    };
    let garment = &GARMENTS[below(GARMENTS.len())];
    let mut content = format!("类型#{}", garment.kind);
    let mut sentences = Vec::new();
    for attribute in COMMON.iter().chain(&garment.own) {
        let value = attribute.values[below(attribute.values.len())];
        if (below(10) as u32) < TENTHS {
            content.push_str(&format!("*{}#{value}", attribute.key));
            if kind == DemoKind::Advert || WHEN.contains(&attribute.key) {
                sentences.push(attribute.sentence.replace("{}", value));
            }
        }
    }
    let ending = ENDINGS[below(ENDINGS.len())];
    match kind {
        DemoKind::Advert => sentences.push(ending.to_owned()),
        DemoKind::Answer if sentences.is_empty() => sentences.push(ANY_TIME.to_owned()),
        DemoKind::Answer => {}
    }
    (content, format!("这款{}，{}。", garment.name, sentences.join("，")))
}

/// `n` rows (content, summary), the same for the same seed.
pub fn demo_rows(kind: DemoKind, n: usize, seed: u64) -> Vec<(String, String)> {
    (0..n as u64).map(|index| demo_row(kind, seed, index)).collect()
}

/// Whether files with other content may be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    No,
    Yes,
}

/// Writes `train.jsonl` and `dev.jsonl` into `dir` with the columns `content` and `summary`; no row of one has an attribute list of the other.
/// Each file appears whole or not at all; one that already holds these rows is left as it is. A file of 0 rows is none, since no command
/// takes one. With equal numbers and seed the lists of two kinds are equal, so that a row held out from one is held out from both.
///
/// # Errors
/// When a file is there with other rows and `overwrite` is [`Overwrite::No`] (then nothing is written), or a file cannot be written or removed.
pub fn write_demo(
    dir: &Path,
    kind: DemoKind,
    num_train: usize,
    num_valid: usize,
    seed: u64,
    overwrite: Overwrite,
) -> Result<(), DataError> {
    let train = demo_rows(kind, num_train, seed);
    let seen: HashSet<&str> = train.iter().map(|(content, _)| content.as_str()).collect();
    let later = (num_train as u64..).map(|index| demo_row(kind, seed, index));
    let valid: Vec<_> = later.filter(|(content, _)| !seen.contains(content.as_str())).take(num_valid).collect();
    let mut stale = Vec::new();
    for (name, rows) in [(TRAIN_FILE, &train), (DEV_FILE, &valid)] {
        let (path, text) = (dir.join(name), json_lines(rows));
        match std::fs::read(&path) {
            Ok(old) if old == text.as_bytes() && !rows.is_empty() => {}
            Ok(_) if overwrite == Overwrite::No => return Err(DataError::Exists { path }),
            Err(source) if source.kind() != ErrorKind::NotFound => return Err(DataError::Read { path, source }),
            Err(_) if rows.is_empty() => {}
            _ => stale.push((path, text)),
        }
    }
    std::fs::create_dir_all(dir).map_err(|source| DataError::Write { path: dir.to_owned(), source })?;
    for (path, text) in stale {
        let replaced = if text.is_empty() { std::fs::remove_file(&path) } else { write_atomically(&path, &[text.as_bytes()]) };
        replaced.map_err(|source| DataError::Write { path, source })?;
    }
    Ok(())
}

fn json_lines(rows: &[(String, String)]) -> String {
    let line = |(content, summary): &(String, String)| format!("{}\n", serde_json::json!({ "content": content, "summary": summary }));
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demo_rows_are_the_same_for_a_seed_and_few_repeat() {
        let rows = demo_rows(DemoKind::Advert, 2000, 1);
        assert_eq!(rows[..100], demo_rows(DemoKind::Advert, 100, 1));
        assert_ne!(rows[..100], demo_rows(DemoKind::Advert, 100, 2));
        let distinct: HashSet<_> = rows.iter().collect();
        assert!(distinct.len() > 1950, "{} distinct rows of 2000", distinct.len());
    }

    #[test]
    fn demo_grammar_has_few_characters_and_over_a_million_rows() {
        let rows = demo_rows(DemoKind::Advert, 5000, 3);
        let chars: HashSet<char> = rows.iter().flat_map(|(c, s)| c.chars().chain(s.chars())).collect();
        assert!(chars.len() < 400, "{} characters", chars.len());
        let of = |attributes: &[Attribute]| attributes.iter().map(|a| a.values.len() as u64 + 1).product::<u64>();
        let lists: u64 = GARMENTS.iter().map(|g| of(COMMON) * of(&g.own)).sum();
        assert!(lists > 1_000_000, "{lists} attribute lists");
    }

    fn values(list: &str) -> impl Iterator<Item = (&str, &str)> {
        list.split('*').skip(1).filter_map(|pair| pair.split_once('#'))
    }

    #[test]
    fn demo_advert_names_every_attribute_of_its_list() {
        for (content, summary) in demo_rows(DemoKind::Advert, 500, 9) {
            for (_, value) in values(&content) {
                assert!(summary.contains(value), "{value} is not in {summary}");
            }
        }
    }

    /// A tokenizer and a base that were trained on adverts know all that an answer says.
    #[test]
    fn demo_answer_has_the_list_and_sentences_of_the_advert_that_are_about_season_and_occasion() {
        let [adverts, answers] = [DemoKind::Advert, DemoKind::Answer].map(|kind| demo_rows(kind, 2000, 4));
        for ((list, advert), (same, answer)) in adverts.iter().zip(&answers) {
            assert_eq!(list, same);
            let when: Vec<&str> = values(list).filter(|(key, _)| WHEN.contains(key)).map(|(_, value)| value).collect();
            let mut parts = answer.trim_end_matches('。').split('，');
            assert!(advert.starts_with(parts.next().unwrap()));
            let sentences: Vec<&str> = parts.collect();
            assert_eq!(sentences.len(), when.len().max(1), "{list}: {answer}");
            for (value, sentence) in when.iter().zip(&sentences) {
                assert!(sentence.contains(value) && advert.contains(sentence), "{list}: {answer}");
            }
            if when.is_empty() {
                assert!(ENDINGS.contains(&sentences[0]), "{answer}");
            }
        }
    }

    #[test]
    fn demo_rows_stay_what_they_were() {
        let [(list, advert), (_, answer)] = [DemoKind::Advert, DemoKind::Answer].map(|kind| demo_rows(kind, 1, 0).remove(0));
        assert_eq!(list, "类型#裙*版型#修身*材质#棉*颜色#紫色*风格#清新*图案#条纹*季节#夏季*裙型#百褶裙");
        let told = "这款裙子，修身的版型穿着舒服，棉面料手感柔软，紫色让人眼前一亮，带着清新的气息，条纹图案很有特色，适合夏季，\
                    百褶裙的线条随步伐摆动，怎么搭配都好看。";
        assert_eq!(advert, told);
        assert_eq!(answer, "这款裙子，适合夏季。");
    }

    #[test]
    fn demo_files_are_written_once_and_others_are_not_overwritten_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let write = |train, overwrite| write_demo(dir.path(), DemoKind::Advert, train, 20, 7, overwrite);
        write(300, Overwrite::No).unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let (train, dev) = (read(TRAIN_FILE), read(DEV_FILE));
        assert_eq!((train.lines().count(), dev.lines().count()), (300, 20));
        let lists = |text: &str| text.lines().map(|l| l.split("\",\"").next().unwrap().to_owned()).collect::<HashSet<_>>();
        assert!(lists(&train).is_disjoint(&lists(&dev)));
        write(300, Overwrite::No).unwrap();
        assert!(matches!(write(301, Overwrite::No), Err(DataError::Exists { .. })));
        assert_eq!(read(TRAIN_FILE), train, "a refusal leaves the files alone");
        write(301, Overwrite::Yes).unwrap();
        assert_eq!(read(TRAIN_FILE).lines().count(), 301);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn demo_file_of_no_rows_is_none_and_an_old_one_goes_only_if_asked() {
        let dir = tempfile::tempdir().unwrap();
        let write = |valid, overwrite| write_demo(dir.path(), DemoKind::Answer, 5, valid, 7, overwrite);
        let names = || std::fs::read_dir(dir.path()).unwrap().count();
        write(0, Overwrite::No).unwrap();
        assert_eq!(names(), 1);
        write(3, Overwrite::No).unwrap();
        assert_eq!(names(), 2);
        assert!(matches!(write(0, Overwrite::No), Err(DataError::Exists { .. })));
        assert_eq!(names(), 2);
        write(0, Overwrite::Yes).unwrap();
        assert_eq!(names(), 1);
    }
}

//! Malformed CSV: an error or a bad row with its line, and no row after it is lost.

use glmddp::data::load::{LoadRequest, load};
use glmddp::data::record::OnBadRow;
use glmddp::data::{Alone, BadRowKind};

use crate::row_support::{Chars, Dir, request, texts};

/// A header and 28 good rows, with `bad` as line 3.
fn with_line_3(bad: &str) -> String {
    let rows: String = (0..27).map(|i| format!("q{i},a{i}\n")).collect();
    format!("content,summary\nq,a\n{bad}\n{rows}")
}

/// What is wrong with line 3, by name.
const BAD: [(&str, &str); 8] = [
    ("open quote", "\"an open quote,b"),
    ("open quote in the last cell", "a,\"b"),
    ("text after a quote", "\"x\"y,b"),
    ("quote in a cell", "5\" pipe,b"),
    ("blank before a quote", "a, \"b, c\""),
    ("lone carriage return", "a,b\rc"),
    ("too many cells", "a,b,c"),
    ("too few cells", "a"),
];

#[test]
fn malformed_row_is_an_error_with_its_line() {
    let dir = Dir::new();
    let all = BAD.map(|(name, bad)| format!("# {name}\n{}", dir.error_of("a.csv", with_line_3(bad))));
    insta::assert_snapshot!("malformed_row", all.join("\n\n"));
}

#[test]
fn malformed_row_left_out_takes_no_other_row_along() {
    let dir = Dir::new();
    for (name, bad) in BAD {
        let request = LoadRequest { on_bad_row: OnBadRow::Skip, ..request(&dir.file("a.csv", with_line_3(bad))) };
        let (set, _) = load(&request, &Chars, &Alone).unwrap();
        assert_eq!((set.num_samples(), set.bad_rows.total), (28, 1), "{name}");
        assert_eq!(set.bad_rows.first[0].row, 3, "{name}");
        let rows: Vec<usize> = texts(&set).into_iter().map(|(row, _)| row).collect();
        assert_eq!(rows, std::iter::once(2).chain(4..31).collect::<Vec<_>>(), "{name}");
    }
}

#[test]
fn quote_opened_in_the_last_row_or_closed_by_a_later_one_names_the_row_that_opens_it() {
    let dir = Dir::new();
    let last = "content,summary\nq,a\nr,\"b";
    let closed_later = "content,summary\nq,\"a\nr,b\ns,\"c, d\"\nt,e\n";
    insta::assert_snapshot!("open_quote", [dir.error_of("last.csv", last), dir.error_of("later.csv", closed_later)].join("\n\n"));
    let request = LoadRequest { on_bad_row: OnBadRow::Skip, ..request(&dir.file("later.csv", closed_later)) };
    let (set, _) = load(&request, &Chars, &Alone).unwrap();
    assert_eq!(set.bad_rows.by_kind[&BadRowKind::BadCsv], 1);
    assert_eq!(texts(&set).len(), 3);
}

#[test]
fn malformed_header_is_an_error() {
    let dir = Dir::new();
    let all = [
        dir.error_of("open.csv", "content,\"summary\nq,a\n"),
        dir.error_of("after.csv", "content,\"summary\"x\nq,a\n"),
        dir.error_of("twice.csv", "content,summary,content\nq,a,b\n"),
        dir.error_of("empty.csv", ",,\nq,a,b\n"),
        dir.error_of("blanks.csv", "content, summary\nq,a\n"),
    ];
    insta::assert_snapshot!("malformed_header", all.join("\n\n"));
}

#[test]
fn other_separators_and_excels_line_are_told_apart_from_names() {
    let dir = Dir::new();
    let all = [
        dir.error_of("quoted.csv", "\"content\";\"summary\"\n\"q\";\"a\"\n"),
        dir.error_of("tabs.csv", "\"content\"\t\"summary\"\n\"q\"\t\"a\"\n"),
        dir.error_of("half.csv", "content;\"summary\"\nq;\"a\"\n"),
        dir.error_of("comma.csv", "content;summary;price, EUR\nq;a;1\n"),
        dir.error_of("excel.csv", "\u{feff}sep=,\r\ncontent,summary\r\nq,a\r\n"),
        dir.error_of("excel_semicolon.csv", "sep=;\ncontent;summary\nq;a\n"),
        dir.error_of("excel_quoted.csv", "\"SEP=,\"\ncontent,summary\nq,a\n"),
        // Not another separator.
        dir.error_of("names.csv", "a;b,c;d\nq,a\n"),
    ];
    insta::assert_snapshot!("other_separators", all.join("\n\n"));
}

#[test]
fn well_formed_csv_of_every_dialect_is_read() {
    let dir = Dir::new();
    let of = |content: &str| {
        let (set, _) = load(&request(&dir.file("a.csv", content)), &Chars, &Alone).unwrap();
        texts(&set)
            .into_iter()
            .map(|(row, text)| format!("{row}: {}", text.replace("[Round 1]\n\n问：", "").replace("\n\n答：", " -> ")))
            .collect::<Vec<_>>()
    };
    let rows = ["2: q, \"x\"\ny -> a", "4: r -> b"];
    assert_eq!(of("content,summary\n\"q, \"\"x\"\"\ny\",a\nr,b\n"), rows);
    assert_eq!(
        of("\u{feff}\"content\",\"summary\"\n\"q, \"\"x\"\"\ny\",a\nr,\"b\""),
        rows,
        "byte order mark, quoted header, no last line end"
    );
    assert_eq!(of("content,summary\r\"q, \"\"x\"\"\ny\",a\rr,b\r"), ["2: q, \"x\"\ny -> a", "3: r -> b"], "classic Mac");
    assert_eq!(of("content,summary\r\nq,a\r\n\r\nr,b\r\n"), ["2: q -> a", "4: r -> b"], "CRLF and a blank line");
    assert_eq!(of(",content,,summary\n0,q,,a\n"), ["2: q -> a"], "columns without a name, as pandas writes its index");
    assert_eq!(of("id,content,id,summary\n0,q,1,a\n"), ["2: q -> a"], "a name twice that no key asks for");
    let long = "x".repeat(1 << 20);
    let (set, _) = load(&request(&dir.file("a.csv", format!("content,summary\nq,\"{long}\"\n"))), &Chars, &Alone).unwrap();
    assert_eq!(set.num_cut_answers, 1, "a cell of 1 MiB");
}

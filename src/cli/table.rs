//! Tables for people, and the units in them.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

/// A table without frames; the columns in `right` hold numbers.
pub fn table(header: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    for &column in right {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Prints a [`table`] of `rows`.
pub fn print<const N: usize>(
    header: [&str; N],
    right: &[usize],
    rows: impl IntoIterator<Item = [String; N]>,
) {
    let mut table = table(&header, right);
    table.add_rows(rows);
    println!("{table}");
}

/// Bytes in decimal units with three digits, as vendors and `SPEED.md` write them.
pub fn bytes(bytes: u64) -> String {
    for (unit, size) in [("GB", 1e9), ("MB", 1e6), ("kB", 1e3)] {
        let value = bytes as f64 / size;
        if value >= 1.0 {
            let digits = if value >= 100.0 { 1 } else { 3 };
            return format!("{value:.digits$} {unit}");
        }
    }
    format!("{bytes} B")
}

/// 19339781632 as 19,339,781,632.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_sized() {
        assert_eq!(grouped(19_339_781_632), "19,339,781,632");
        assert_eq!((grouped(0), grouped(999), grouped(1000)), ("0".into(), "999".into(), "1,000".into()));
        assert_eq!(bytes(19_339_781_632), "19.340 GB");
        assert_eq!((bytes(999), bytes(241_337_000_000)), ("999 B".into(), "241.3 GB".into()));
    }
}

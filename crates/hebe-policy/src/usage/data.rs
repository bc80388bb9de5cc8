//! Measurements: what may be measured, and how tables of it are read.
//!
//! A table is CSV with a header. Columns: `method` (or `quantity`), `n`, and
//! `downtime_ms` (or `seconds`); `repeat` and `service` if there are any; others
//! are passed over. `cargo xtask bench reboot --csv` writes such a table.
//!
//! VMs of one reboot wait for the same kernel, so their downtimes are one
//! measurement, not many: where `repeat` says which rows belong together, their
//! mean is the sample, as in the papers' plots.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

/// Most rows that a table may have.
const ROWS_MAX: usize = 1_000_000;
/// Most VMs that a row may speak of.
const N_MAX: f64 = 100_000.0;
/// Longest time that a row may speak of, in seconds: a year.
const SECONDS_MAX: f64 = 366.0 * 86_400.0;

/// What can be measured, in seconds, with n VMs on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantity {
    /// Downtime of a warm reboot, as a whole: d_w(n).
    Warm,
    /// Downtime of a reboot with all VMs saved to disk.
    Saved,
    /// Downtime of a cold reboot, as a whole, nothing credited: d_c(n) at α = 0.
    Cold,
    /// A VM's downtime in one migration to another host.
    Evacuate,
    /// Reboot of the VMM layer by quick reload with n VMs frozen.
    RebootVmm,
    /// On-memory suspend and resume of n VMs at once.
    Resume,
    /// Shutdown and boot of n guests at once.
    RebootOs,
    /// Boot of n guests at once; in no formula.
    Boot,
    /// Reset of the hardware; does not depend on n.
    ResetHw,
}

impl Quantity {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Warm,
        Self::Saved,
        Self::Cold,
        Self::Evacuate,
        Self::RebootVmm,
        Self::Resume,
        Self::RebootOs,
        Self::Boot,
        Self::ResetHw,
    ];

    /// As in a table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Saved => "saved",
            Self::Cold => "cold",
            Self::Evacuate => "evacuate",
            Self::RebootVmm => "reboot-vmm",
            Self::Resume => "resume",
            Self::RebootOs => "reboot-os",
            Self::Boot => "boot",
            Self::ResetHw => "reset-hw",
        }
    }

    /// Whether it is the same for every number of VMs.
    pub fn is_constant(self) -> bool {
        matches!(self, Self::ResetHw | Self::Evacuate)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Of what.
    pub quantity: Quantity,
    /// Number of VMs.
    pub n: f64,
    /// How long.
    pub seconds: f64,
}

/// Measurements of one service.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Table {
    /// The samples.
    pub samples: Vec<Sample>,
    /// The service that was measured, if the table names any.
    pub service: Option<String>,
    /// Other services in the same table.
    pub other_services: Vec<String>,
}

/// Why a table is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DataError {
    /// A column is not there.
    #[error(
        "the table has no column '{0}': its first line must name the columns, such as method,n,downtime_ms"
    )]
    NoColumn(&'static str),
    /// A cell is empty.
    #[error("line {line} has no '{column}': fill the gap or take the line out")]
    Gap {
        /// Which line, from 1.
        line: u64,
        /// Which column.
        column: &'static str,
    },
    /// Not CSV.
    #[error("the table cannot be read: {0}")]
    Malformed(String),
    /// A cell holds no number that can be meant.
    #[error("line {line} has {column} = '{text}': it must be {wanted}")]
    BadNumber {
        /// Which line, from 1.
        line: u64,
        /// Which column.
        column: &'static str,
        /// What stands there.
        text: String,
        /// What may stand there.
        wanted: &'static str,
    },
    /// A method that nobody knows.
    #[error(
        "line {line} is about '{text}': known are warm, saved, cold, evacuate, reboot-vmm, resume, reboot-os, boot and reset-hw"
    )]
    UnknownQuantity {
        /// Which line, from 1.
        line: u64,
        /// What stands there.
        text: String,
    },
    /// No rows.
    #[error("the table has no measurements")]
    Empty,
    /// More rows than anybody measures.
    #[error("the table has more than {ROWS_MAX} lines: is it the right file?")]
    TooLong,
    /// The service asked for is not in it.
    #[error("no line is about service '{asked}': there are {there}")]
    NoSuchService {
        /// What was asked for.
        asked: String,
        /// What there is.
        there: String,
    },
}

/// One line, checked.
struct Row {
    quantity: Quantity,
    n: f64,
    seconds: f64,
    repeat: Option<String>,
    service: Option<String>,
}

/// Where the columns are.
struct Columns {
    quantity: (usize, &'static str),
    n: usize,
    time: (usize, &'static str, f64),
    repeat: Option<usize>,
    service: Option<usize>,
}

impl Columns {
    fn find(header: &csv::StringRecord) -> Result<Self, DataError> {
        let at = |name: &str| header.iter().position(|cell| cell == name);
        let quantity = [("method", "method"), ("quantity", "quantity")]
            .iter()
            .find_map(|(name, label)| Some((at(name)?, *label)));
        let time = [("downtime_ms", 1e-3), ("seconds", 1.0)]
            .iter()
            .find_map(|(name, unit)| Some((at(name)?, *name, *unit)));
        Ok(Self {
            quantity: quantity.ok_or(DataError::NoColumn("method"))?,
            n: at("n").ok_or(DataError::NoColumn("n"))?,
            time: time.ok_or(DataError::NoColumn("downtime_ms"))?,
            repeat: at("repeat"),
            service: at("service"),
        })
    }

    fn row(&self, record: &csv::StringRecord) -> Result<Row, DataError> {
        let line = record.position().map_or(0, csv::Position::line);
        let cell = |index: usize, column: &'static str| {
            let text = record.get(index).unwrap_or_default();
            if text.is_empty() {
                return Err(DataError::Gap { line, column });
            }
            Ok(text)
        };
        let text = cell(self.quantity.0, self.quantity.1)?;
        let known = Quantity::ALL.into_iter().find(|q| q.name() == text);
        let quantity = known.ok_or_else(|| DataError::UnknownQuantity {
            line,
            text: text.to_owned(),
        })?;
        let number = |index, column, wanted, fits: &dyn Fn(f64) -> bool| {
            let text = cell(index, column)?;
            let value = text.parse::<f64>().ok().filter(|v| fits(*v));
            value.ok_or_else(|| DataError::BadNumber {
                line,
                column,
                text: text.to_owned(),
                wanted,
            })
        };
        let n = number(self.n, "n", "a whole number of VMs, 0 or more", &|v| {
            v.fract() == 0.0 && (0.0..=N_MAX).contains(&v)
        })?;
        let (index, column, unit) = self.time;
        let wanted = "a time from 0 to a year";
        let time = number(index, column, wanted, &|v| {
            (0.0..=SECONDS_MAX).contains(&(v * unit))
        })?;
        let own = |index: Option<usize>, column| match index {
            Some(index) => cell(index, column).map(|text| Some(text.to_owned())),
            None => Ok(None),
        };
        Ok(Row {
            quantity,
            n,
            seconds: time * unit,
            repeat: own(self.repeat, "repeat")?,
            service: own(self.service, "service")?,
        })
    }
}

/// Reads a table. Of several services the one called `service` counts, or the
/// first one that the table names.
pub fn read_csv(bytes: &[u8], service: Option<&str>) -> Result<Table, DataError> {
    let malformed = |e: csv::Error| DataError::Malformed(e.to_string());
    let mut reader = csv::ReaderBuilder::new()
        .trim(csv::Trim::All)
        .comment(Some(b'#'))
        .from_reader(bytes);
    let columns = Columns::find(reader.headers().map_err(malformed)?)?;
    let mut rows = Vec::new();
    for record in reader.records() {
        rows.push(columns.row(&record.map_err(malformed)?)?);
        if rows.len() > ROWS_MAX {
            return Err(DataError::TooLong);
        }
    }
    let first = rows.iter().find_map(|row| row.service.clone());
    let there: BTreeSet<String> = rows.iter().filter_map(|r| r.service.clone()).collect();
    let chosen = service.map(str::to_owned).or(first);
    if let Some(asked) = chosen.as_ref().filter(|asked| !there.contains(*asked)) {
        let names: Vec<&str> = there.iter().map(String::as_str).collect();
        return Err(DataError::NoSuchService {
            asked: asked.clone(),
            there: if names.is_empty() {
                "no services in it".into()
            } else {
                names.join(", ")
            },
        });
    }
    rows.retain(|row| row.service == chosen);
    let samples = merge(rows);
    if samples.is_empty() {
        return Err(DataError::Empty);
    }
    Ok(Table {
        samples,
        other_services: there
            .into_iter()
            .filter(|name| Some(name) != chosen.as_ref())
            .collect(),
        service: chosen,
    })
}

/// The mean of the rows of each repeat; rows without a repeat stand alone.
fn merge(rows: Vec<Row>) -> Vec<Sample> {
    let mut repeats: BTreeMap<(Quantity, u64, String), Vec<f64>> = BTreeMap::new();
    let mut samples = Vec::new();
    for row in rows {
        let Some(repeat) = row.repeat else {
            samples.push(Sample {
                quantity: row.quantity,
                n: row.n,
                seconds: row.seconds,
            });
            continue;
        };
        let key = (row.quantity, row.n as u64, repeat);
        repeats.entry(key).or_default().push(row.seconds);
    }
    let merged = repeats.into_iter().map(|((quantity, n, _), all)| Sample {
        quantity,
        n: n as f64,
        seconds: all.iter().sum::<f64>() / all.len() as f64,
    });
    samples.extend(merged);
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "method,n,repeat,vm,service,downtime_ms\n";

    fn read(rows: &str) -> Result<Table, DataError> {
        read_csv(format!("{HEAD}{rows}").as_bytes(), None)
    }

    #[test]
    fn vms_of_one_reboot_are_one_sample() {
        let table = read(
            "warm,2,0,vm1,light,1000.0\nwarm,2,0,vm2,light,3000.0\n\
             warm,2,1,vm1,light,5000.0\nwarm,2,0,vm1,slow-starting,9000.0\n",
        )
        .expect("table");
        let seconds: Vec<f64> = table.samples.iter().map(|s| s.seconds).collect();
        assert_eq!(seconds, [2.0, 5.0]);
        assert_eq!(table.service.as_deref(), Some("light"));
        assert_eq!(table.other_services, ["slow-starting"]);
    }

    #[test]
    fn a_plain_table_of_parts_is_read_too() {
        let text = "quantity, n, seconds\n# by hand\nreset-hw, 0, 47\nresume, 11, 4.66\n";
        let table = read_csv(text.as_bytes(), None).expect("table");
        assert_eq!(table.samples.len(), 2);
        assert_eq!(table.samples[1].seconds, 4.66);
    }

    /// Each bad table is refused with one sentence that says where and what.
    #[test]
    fn bad_tables_are_refused_with_a_sentence() {
        for (rows, word) in [
            ("", "no measurements"),
            ("warm,1,0,vm1,light,\n", "line 2 has no 'downtime_ms'"),
            ("warm,,0,vm1,light,1\n", "line 2 has no 'n'"),
            ("warm,1,0,vm1,,1\n", "line 2 has no 'service'"),
            ("warm,1,0,vm1\n", "cannot be read"),
            ("warm,1,0,vm1,light,-5\n", "downtime_ms = '-5'"),
            ("warm,-1,0,vm1,light,5\n", "n = '-1'"),
            ("warm,1.5,0,vm1,light,5\n", "n = '1.5'"),
            ("warm,1,0,vm1,light,NaN\n", "'NaN'"),
            ("warm,1,0,vm1,light,inf\n", "'inf'"),
            ("warm,1,0,vm1,light,1e300\n", "'1e300'"),
            ("warm,1,0,vm1,light,quick\n", "'quick'"),
            ("tepid,1,0,vm1,light,5\n", "about 'tepid'"),
        ] {
            let error = read(rows).expect_err(rows).to_string();
            assert!(error.contains(word), "{rows}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        let no_column = read_csv(b"method,vms,downtime_ms\nwarm,1,1\n", None);
        assert_eq!(no_column, Err(DataError::NoColumn("n")));
        assert!(read_csv(b"", None).is_err());
        assert!(read_csv(&[0xff, 0xfe, 0x00, b'\n', 0xff], None).is_err());
        let other = read_csv(
            format!("{HEAD}warm,1,0,a,light,1\n").as_bytes(),
            Some("web"),
        );
        assert!(
            other
                .expect_err("service")
                .to_string()
                .contains("there are light")
        );
    }
}

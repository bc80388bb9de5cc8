//! Calendar events in systemd's `OnCalendar` syntax: a subset of it, and the
//! time zone is always said.
//!
//! ```text
//! [WEEKDAYS] [DATE] [TIME] ZONE        Sat..Sun *-*-1..7 03:00 Europe/Berlin
//! DATE   YEAR-MONTH-DAY or MONTH-DAY   absent: every day
//! TIME   HOUR:MINUTE[:SECOND]          absent: 00:00:00
//! each field: *, a number, a list a,b, a range a..b, and /step after any
//! hourly, daily, weekly, monthly, yearly ZONE
//! ```
//!
//! Left out: `~` for days from a month's end, fractions of seconds, and local
//! time without a zone, because a policy does not know where it runs. A local
//! time that a night skips is moved by what was skipped; one that a night has
//! twice is its first.

use std::fmt;
use std::str::FromStr;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::{TimeZone, TimeZoneDatabase};
use jiff::{Timestamp, ToSpan};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::span::Span;

/// Days that are looked through for the next event: weekday and date come
/// together again within forty years.
const DAYS_MAX: u32 = 40 * 366;
const WEEKDAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const YEARS: (i16, i16) = (1970, 2200);

/// A moment: seconds since 1970, UTC.
pub type Moment = i64;

/// Which values of a field fit.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Field(Vec<Part>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    from: i16,
    to: i16,
    step: i16,
}

impl Field {
    fn parse(text: &str, (low, high): (i16, i16)) -> Option<Self> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            let value = digits.then(|| text.parse::<i16>().ok()).flatten()?;
            (low..=high).contains(&value).then_some(value)
        };
        let part = |text: &str| {
            let (range, step) = match text.split_once('/') {
                Some((range, step)) => (range, Some(step.parse().ok().filter(|s| *s > 0)?)),
                None => (text, None),
            };
            let (from, to) = match range.split_once("..") {
                _ if range == "*" => (low, high),
                Some((from, to)) => (number(from)?, number(to)?),
                // With a step, a number is where the steps begin.
                None if step.is_some() => (number(range)?, high),
                None => (number(range)?, number(range)?),
            };
            let step = step.unwrap_or(1);
            (from <= to).then_some(Part { from, to, step })
        };
        let parts: Option<Vec<Part>> = text.split(',').map(part).collect();
        parts.map(Self)
    }

    fn one(value: i16) -> Self {
        Self(vec![Part {
            from: value,
            to: value,
            step: 1,
        }])
    }

    fn fits(&self, value: i16) -> bool {
        let within = |p: &Part| (p.from..=p.to).contains(&value) && (value - p.from) % p.step == 0;
        self.0.iter().any(within)
    }
}

/// A calendar event that comes again and again.
#[derive(Clone, Debug)]
pub struct Calendar {
    text: String,
    zone: TimeZone,
    weekdays: [bool; 7],
    date: [Field; 3],
    time: [Field; 3],
}

/// The text is no calendar event.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidCalendar {
    /// No zone.
    #[error("'{0}' has no time zone: write it at the end, such as UTC or Europe/Berlin")]
    NoZone(String),
    /// Anything else.
    #[error("'{0}' is not a calendar event: write it like 'Sat *-*-* 03:00 UTC' ({1})")]
    Part(String, &'static str),
    /// Fits no day.
    #[error("'{0}' never comes")]
    Never(String),
}

impl FromStr for Calendar {
    type Err = InvalidCalendar;

    fn from_str(text: &str) -> Result<Self, InvalidCalendar> {
        let wrong = |why| InvalidCalendar::Part(text.to_owned(), why);
        let mut words: Vec<&str> = text.split_whitespace().collect();
        let zone = words.pop().and_then(zone);
        let zone = zone.ok_or_else(|| InvalidCalendar::NoZone(text.to_owned()))?;
        let long = match words.as_slice() {
            ["hourly"] => Some("*-*-* *:00"),
            ["daily"] => Some("*-*-* 00:00"),
            ["weekly"] => Some("Mon *-*-* 00:00"),
            ["monthly"] => Some("*-*-1 00:00"),
            ["yearly"] => Some("*-1-1 00:00"),
            [] => return Err(wrong("there is only a time zone")),
            _ => None,
        };
        if let Some(long) = long {
            words = long.split_whitespace().collect();
        }
        let mut rest = words.as_slice();
        let mut weekdays = [true; 7];
        if let [first, tail @ ..] = rest
            && first.starts_with(|c: char| c.is_ascii_alphabetic())
        {
            weekdays = parse_weekdays(first).ok_or_else(|| wrong("the weekdays"))?;
            rest = tail;
        }
        let any = |bounds| Field::parse("*", bounds).ok_or_else(|| wrong("a field"));
        let mut date = [any(YEARS)?, any((1, 12))?, any((1, 31))?];
        if let [first, tail @ ..] = rest
            && first.contains('-')
        {
            date = parse_date(first).ok_or_else(|| wrong("the date"))?;
            rest = tail;
        }
        let mut time = [Field::one(0), Field::one(0), Field::one(0)];
        if let [first, tail @ ..] = rest {
            time = parse_time(first).ok_or_else(|| wrong("the time"))?;
            rest = tail;
        }
        if !rest.is_empty() {
            return Err(wrong("something is left over"));
        }
        let calendar = Self {
            text: words_text(text),
            zone,
            weekdays,
            date,
            time,
        };
        if calendar.next_after(calendar.earliest()).is_none() {
            return Err(InvalidCalendar::Never(text.to_owned()));
        }
        Ok(calendar)
    }
}

fn words_text(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ")
}

fn zone(name: &str) -> Option<TimeZone> {
    if name == "UTC" {
        return Some(TimeZone::UTC);
    }
    // No other word of an event has a slash behind a letter.
    let plausible = name.contains('/') && name.starts_with(|c: char| c.is_ascii_alphabetic());
    plausible.then(|| TimeZoneDatabase::bundled().get(name).ok())?
}

fn parse_weekdays(text: &str) -> Option<[bool; 7]> {
    let day = |text: &str| {
        let text = text.to_ascii_lowercase();
        let short = text.get(..3)?;
        let index = WEEKDAYS.iter().position(|d| *d == short)?;
        let long = [
            "monday",
            "tuesday",
            "wednesday",
            "thursday",
            "friday",
            "saturday",
            "sunday",
        ];
        (text.len() == 3 || text == long[index]).then_some(index)
    };
    let mut days = [false; 7];
    for part in text.split(',') {
        let (from, to) = match part.split_once("..") {
            Some((from, to)) => (day(from)?, day(to)?),
            None => (day(part)?, day(part)?),
        };
        // Sat..Mon goes over the week's end.
        let count = (to + 7 - from) % 7;
        for i in 0..=count {
            days[(from + i) % 7] = true;
        }
    }
    Some(days)
}

fn parse_date(text: &str) -> Option<[Field; 3]> {
    let fields: Vec<&str> = text.split('-').collect();
    let (year, month, day) = match fields[..] {
        [year, month, day] => (year, month, day),
        [month, day] => ("*", month, day),
        _ => return None,
    };
    Some([
        Field::parse(year, YEARS)?,
        Field::parse(month, (1, 12))?,
        Field::parse(day, (1, 31))?,
    ])
}

fn parse_time(text: &str) -> Option<[Field; 3]> {
    let fields: Vec<&str> = text.split(':').collect();
    let (hour, minute, second) = match fields[..] {
        [hour, minute] => (hour, minute, "0"),
        [hour, minute, second] => (hour, minute, second),
        _ => return None,
    };
    Some([
        Field::parse(hour, (0, 23))?,
        Field::parse(minute, (0, 59))?,
        Field::parse(second, (0, 59))?,
    ])
}

impl Calendar {
    /// The first event after `now`; `None` if there is none in forty years.
    pub fn next_after(&self, now: Moment) -> Option<Moment> {
        let here = Timestamp::from_second(now)
            .ok()?
            .to_zoned(self.zone.clone());
        let mut date = here.date();
        // Clocks are put back by less than three hours.
        let mut from_hour = i16::from(here.hour()) - 3;
        for _ in 0..DAYS_MAX {
            if self.fits_date(date)
                && let Some(found) = self.first_of_day(date, from_hour, now)
            {
                return Some(found);
            }
            date = date.checked_add(1.day()).ok()?;
            from_hour = 0;
        }
        None
    }

    /// Before the first year that fits.
    fn earliest(&self) -> Moment {
        let years = self.date[0].0.iter().map(|part| part.from);
        let first = Date::new(years.min().unwrap_or(YEARS.0), 1, 1).ok();
        let begins = first.and_then(|date| date.to_zoned(TimeZone::UTC).ok());
        // A day, for zones that are ahead.
        begins.map_or(0, |zoned| zoned.timestamp().as_second() - 86_400)
    }

    fn fits_date(&self, date: Date) -> bool {
        let weekday = date.weekday().to_monday_zero_offset() as usize;
        let [year, month, day] = &self.date;
        self.weekdays[weekday]
            && year.fits(date.year())
            && month.fits(date.month().into())
            && day.fits(date.day().into())
    }

    fn first_of_day(&self, date: Date, from_hour: i16, now: Moment) -> Option<Moment> {
        let [hours, minutes, seconds] = &self.time;
        let fitting = |field: &Field, from: i16, to: i16| {
            let all = (from.max(0)..=to).filter(|v| field.fits(*v));
            all.collect::<Vec<i16>>()
        };
        let (minutes, seconds) = (fitting(minutes, 0, 59), fitting(seconds, 0, 59));
        let mut best: Option<(Moment, DateTime)> = None;
        for hour in fitting(hours, from_hour, 23) {
            for minute in &minutes {
                for second in &seconds {
                    let time = Time::new(hour as i8, *minute as i8, *second as i8, 0).ok()?;
                    let local = date.to_datetime(time);
                    // Only a time that was moved out of a gap can be overtaken.
                    if let Some((found, _)) = best.filter(|(_, moved)| local > *moved) {
                        return Some(found);
                    }
                    let there = self.zone.to_ambiguous_zoned(local).compatible().ok()?;
                    let at = there.timestamp().as_second();
                    if at > now && best.is_none_or(|(found, _)| at < found) {
                        best = Some((at, there.datetime()));
                    }
                }
            }
        }
        best.map(|(found, _)| found)
    }
}

impl PartialEq for Calendar {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl fmt::Display for Calendar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Calendar {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Calendar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A time that begins at each event of a calendar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// When it begins.
    pub from: Calendar,
    /// How long it lasts.
    pub length: Span,
}

impl Window {
    /// The end of the window that `now` lies in, if it lies in one: the first
    /// of those that are open.
    pub fn open_until(&self, now: Moment) -> Option<Moment> {
        let length = i64::try_from(self.length.as_s()).ok()?;
        let began = self.from.next_after(now.checked_sub(length)?)?;
        (began <= now).then(|| began + length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> Moment {
        text.parse::<Timestamp>().expect("time").as_second()
    }

    fn next(calendar: &str, now: &str) -> String {
        let calendar: Calendar = calendar.parse().expect(calendar);
        let found = calendar.next_after(at(now)).expect("an event");
        Timestamp::from_second(found).expect("time").to_string()
    }

    /// Sunday, 22 November 2026.
    const NOW: &str = "2026-11-22T04:00:00Z";

    #[test]
    fn events_come_when_they_should() {
        for (calendar, expected) in [
            ("hourly UTC", "2026-11-22T05:00:00Z"),
            ("daily UTC", "2026-11-23T00:00:00Z"),
            ("weekly UTC", "2026-11-23T00:00:00Z"),
            ("monthly UTC", "2026-12-01T00:00:00Z"),
            ("yearly UTC", "2027-01-01T00:00:00Z"),
            ("Sat 03:00 UTC", "2026-11-28T03:00:00Z"),
            ("Sun 04:00 UTC", "2026-11-29T04:00:00Z"),
            ("Sun 04:00:01 UTC", "2026-11-22T04:00:01Z"),
            ("Sat..Mon 03:00 UTC", "2026-11-23T03:00:00Z"),
            ("Mon,Wednesday 3:00 UTC", "2026-11-23T03:00:00Z"),
            ("*-*-1..7 03:00 UTC", "2026-12-01T03:00:00Z"),
            ("Sat *-*-1..7 03:00 UTC", "2026-12-05T03:00:00Z"),
            ("12-24 UTC", "2026-12-24T00:00:00Z"),
            ("2027-2-3 04:05:06 UTC", "2027-02-03T04:05:06Z"),
            ("*:0/15 UTC", "2026-11-22T04:15:00Z"),
            ("*:10,40 UTC", "2026-11-22T04:10:00Z"),
            ("*:*:* UTC", "2026-11-22T04:00:01Z"),
            ("2/6:00 UTC", "2026-11-22T08:00:00Z"),
            ("*-2-29 UTC", "2028-02-29T00:00:00Z"),
            ("Sat 03:00 Europe/Berlin", "2026-11-28T02:00:00Z"),
            ("05:00 Europe/Berlin", "2026-11-23T04:00:00Z"),
        ] {
            assert_eq!(next(calendar, NOW), expected, "{calendar}");
        }
    }

    /// 28 March 2027: Berlin goes from 02:00 to 03:00. 25 October 2026: from
    /// 03:00 back to 02:00.
    #[test]
    fn nights_that_skip_or_repeat_an_hour() {
        let before = "2027-03-28T00:00:00Z";
        assert_eq!(next("02:30 Europe/Berlin", before), "2027-03-28T01:30:00Z");
        assert_eq!(
            next("2,3:0/30 Europe/Berlin", before),
            "2027-03-28T01:00:00Z"
        );
        let before = "2026-10-24T23:00:00Z";
        assert_eq!(next("02:30 Europe/Berlin", before), "2026-10-25T00:30:00Z");
        let first = "2026-10-25T00:30:00Z";
        assert_eq!(next("02:30 Europe/Berlin", first), "2026-10-26T01:30:00Z");
        assert_eq!(next("3:30 Europe/Berlin", first), "2026-10-25T02:30:00Z");
    }

    #[test]
    fn what_is_no_event_is_refused() {
        for (text, word) in [
            ("Sat 03:00", "no time zone"),
            ("Sat 03:00 Berlin", "no time zone"),
            ("Sat 03:00 Mars/Base", "no time zone"),
            ("", "no time zone"),
            ("UTC", "only a time zone"),
            ("Caturday 03:00 UTC", "weekdays"),
            ("*-13-1 UTC", "the date"),
            ("*-*~1 UTC", "the date"),
            ("24:00 UTC", "the time"),
            ("3 UTC", "the time"),
            ("5..2:00 UTC", "the time"),
            ("*:0/0 UTC", "the time"),
            ("03:00 04:00 UTC", "left over"),
            ("*-2-30 UTC", "never comes"),
            ("1960-1-1 UTC", "the date"),
        ] {
            let error = text.parse::<Calendar>().expect_err(text).to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_window_is_open_from_its_event_to_its_end() {
        let window = Window {
            from: "Fri 22:00 UTC".parse().expect("event"),
            length: Span::hours(4),
        };
        let open = |text| window.open_until(at(text)).map(|end| end - at(NOW));
        assert_eq!(open("2026-11-20T21:59:59Z"), None);
        let end = Some(at("2026-11-21T02:00:00Z") - at(NOW));
        assert_eq!(open("2026-11-20T22:00:00Z"), end);
        assert_eq!(open("2026-11-21T01:59:59Z"), end);
        assert_eq!(open("2026-11-21T02:00:00Z"), None);
    }

    proptest! {
        /// Events only go forward, and there is none between two of them.
        #[test]
        fn events_are_in_order(now in 0i64..4_000_000_000, ahead in 1i64..10_000_000,
                               which in 0usize..5) {
            let text = ["hourly UTC", "Sat 03:00 Europe/Berlin", "2,3:0/30 Europe/Berlin",
                        "monthly America/New_York", "*-*-1..7 1:10,50 UTC"][which];
            let calendar: Calendar = text.parse().expect("event");
            let first = calendar.next_after(now).expect("event");
            prop_assert!(first > now);
            let between = now + ahead % (first - now);
            prop_assert_eq!(calendar.next_after(between), Some(first));
        }

        /// No text brings the reader down.
        #[test]
        fn any_text_is_read_or_refused(text in "[A-Za-z0-9*.,:/ -]{0,30}( UTC)?") {
            let _ = text.parse::<Calendar>();
        }
    }
}

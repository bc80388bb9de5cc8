//! A real-time clock as PCs have it (Motorola MC146818, data sheet of 1984;
//! the century in register 0x32 is IBM's): two ports, 128 registers, no
//! interrupts. It runs by the host's wall clock, so that it is right after
//! every pause; a guest that sets it has its distance from that clock kept.
//!
//! A guest reads register by register. As with the chip, bit 7 of register A
//! (UIP) says that the time is about to change within 244 µs.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hebe_state::v1::machine::RtcV1;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const CENTURY: u8 = 0x32;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
/// The time's registers, in the order in which a state keeps them.
const TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

const A_UPDATING: u8 = 1 << 7;
/// Divider for 32,768 Hz; the rate that firmware leaves.
const A_DEFAULT: u8 = 0x26;
/// The guest sets the time: it stands still.
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Time and memory are valid.
const D_VALID: u8 = 1 << 7;
const PM: u8 = 1 << 7;

const REGISTERS: usize = 128;
const SECOND_NS: u64 = 1_000_000_000;
/// How long before a change UIP is set.
const UPDATE_NS: u64 = 244_000;
const DAY_S: i64 = 86_400;

/// The host's wall clock, in nanoseconds since 1970.
type WallClock = Box<dyn Fn() -> u64 + Send + Sync>;

/// The device.
pub struct Rtc {
    clock: WallClock,
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for Rtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rtc").field("inner", &self.inner).finish()
    }
}

#[derive(Debug)]
struct Inner {
    index: u8,
    /// Seconds that the guest's clock is ahead of the host's.
    ahead_s: i64,
    /// The time's registers while the guest sets it.
    set: Option<[u8; TIME.len()]>,
    registers: [u8; REGISTERS],
}

/// A moment as a calendar has it, in UTC as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moment {
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

impl Rtc {
    /// A clock that shows what `clock` says: nanoseconds since 1970, UTC.
    pub fn new(clock: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        let mut registers = [0; REGISTERS];
        registers[usize::from(REG_A)] = A_DEFAULT;
        registers[usize::from(REG_B)] = B_24_HOURS;
        Self {
            clock: Box::new(clock),
            inner: Mutex::new(Inner {
                index: 0,
                ahead_s: 0,
                set: None,
                registers,
            }),
        }
    }

    /// The device as saved, by `clock`.
    pub fn restore(state: &RtcV1, clock: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        let this = Self::new(clock);
        {
            let mut inner = this.inner();
            inner.index = state.index & 0x7f;
            inner.ahead_s = state.ahead_s;
            inner.set = state.set;
            for (place, value) in inner.registers.iter_mut().zip(&state.registers) {
                *place = *value;
            }
        }
        this
    }

    /// Its state. Only while vCPUs stand still.
    pub fn save(&self) -> RtcV1 {
        let inner = self.inner();
        RtcV1 {
            index: inner.index,
            ahead_s: inner.ahead_s,
            set: inner.set,
            registers: inner.registers.to_vec(),
        }
    }

    /// Reads the port at `offset` (0: index, 1: data).
    pub fn pio_read(&self, offset: u16) -> u8 {
        let inner = self.inner();
        // The index cannot be read, on most boards.
        if offset != 1 {
            return 0xff;
        }
        let now = (self.clock)();
        match inner.index {
            REG_A => {
                let updating = SECOND_NS - now % SECOND_NS <= UPDATE_NS && inner.set.is_none();
                let a = inner.registers[usize::from(REG_A)] & !A_UPDATING;
                if updating { a | A_UPDATING } else { a }
            }
            // No interrupt was asked for that would be pending.
            REG_C => 0,
            REG_D => D_VALID,
            index => match TIME.iter().position(|r| *r == index) {
                Some(place) => inner.time(now)[place],
                None => inner.registers[usize::from(index)],
            },
        }
    }

    /// Writes the port at `offset`.
    pub fn pio_write(&self, offset: u16, value: u8) {
        let mut inner = self.inner();
        if offset == 0 {
            // Bit 7 masks NMIs, of which there are none.
            inner.index = value & 0x7f;
            return;
        }
        let now = (self.clock)();
        match inner.index {
            REG_B => inner.write_b(value, now),
            REG_C | REG_D => {}
            index => match TIME.iter().position(|r| *r == index) {
                Some(place) => {
                    let mut time = inner.time(now);
                    time[place] = value;
                    match &mut inner.set {
                        Some(set) => *set = time,
                        None => inner.take(&time, now),
                    }
                }
                None => inner.registers[usize::from(index)] = value,
            },
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn b(&self) -> u8 {
        self.registers[usize::from(REG_B)]
    }

    /// A time stands still from the moment in which SET is set, and goes on
    /// with what is there when it is cleared.
    fn write_b(&mut self, value: u8, now: u64) {
        let time = self.time(now);
        self.registers[usize::from(REG_B)] = value;
        match (self.set, value & B_SET != 0) {
            (None, true) => self.set = Some(time),
            (Some(set), false) => {
                self.set = None;
                self.take(&set, now);
            }
            _ => {}
        }
    }

    /// The time's registers.
    fn time(&self, now: u64) -> [u8; TIME.len()] {
        if let Some(set) = self.set {
            return set;
        }
        let seconds = (now / SECOND_NS) as i64;
        let seconds = seconds.saturating_add(self.ahead_s);
        let moment = Moment::of(seconds);
        let weekday = (seconds.div_euclid(DAY_S) + 4).rem_euclid(7) + 1;
        let number = |value: i64| self.number(value);
        [
            number(moment.second),
            number(moment.minute),
            self.hour(moment.hour),
            number(weekday),
            number(moment.day),
            number(moment.month),
            number(moment.year.rem_euclid(100)),
            number(moment.year.div_euclid(100).rem_euclid(100)),
        ]
    }

    /// Goes on with these registers; with nonsense as before.
    fn take(&mut self, time: &[u8; TIME.len()], now: u64) {
        let value = |register: u8| {
            let place = TIME.iter().position(|r| *r == register);
            place.and_then(|place| self.value(time[place]))
        };
        let hour = TIME.iter().position(|r| *r == HOURS);
        let hour = hour.and_then(|place| self.hour_of(time[place]));
        let moment = || {
            Some(Moment {
                year: value(CENTURY)? * 100 + value(YEAR)?,
                month: value(MONTH)?,
                day: value(DAY)?,
                hour: hour?,
                minute: value(MINUTES)?,
                second: value(SECONDS)?,
            })
        };
        if let Some(seconds) = moment().and_then(Moment::seconds) {
            self.ahead_s = seconds - (now / SECOND_NS) as i64;
        }
    }

    /// As the guest wants numbers: binary, or a digit in each half.
    fn number(&self, value: i64) -> u8 {
        let value = value.clamp(0, 99) as u8;
        if self.b() & B_BINARY != 0 {
            return value;
        }
        ((value / 10) << 4) | (value % 10)
    }

    fn value(&self, register: u8) -> Option<i64> {
        if self.b() & B_BINARY != 0 {
            return Some(i64::from(register));
        }
        let (tens, ones) = (register >> 4, register & 0xf);
        (tens < 10 && ones < 10).then(|| i64::from(tens * 10 + ones))
    }

    fn hour(&self, hour: i64) -> u8 {
        if self.b() & B_24_HOURS != 0 {
            return self.number(hour);
        }
        let of_twelve = self.number(if hour % 12 == 0 { 12 } else { hour % 12 });
        if hour < 12 { of_twelve } else { of_twelve | PM }
    }

    fn hour_of(&self, register: u8) -> Option<i64> {
        if self.b() & B_24_HOURS != 0 {
            return self.value(register);
        }
        let of_twelve = self.value(register & !PM)?;
        let afternoon = if register & PM != 0 { 12 } else { 0 };
        (1..=12)
            .contains(&of_twelve)
            .then_some(of_twelve % 12 + afternoon)
    }
}

impl Moment {
    /// From seconds since 1970.
    fn of(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(DAY_S), seconds.rem_euclid(DAY_S));
        // 400 years have 146,097 days; counted from a 1st of March, the day
        // that a leap year has more comes last.
        let days = days.saturating_add(719_468);
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let leaps = day_of_era / 1_460 - day_of_era / 36_524 + day_of_era / 146_096;
        let year_of_era = (day_of_era - leaps) / 365;
        let before = 365 * year_of_era + year_of_era / 4 - year_of_era / 100;
        let day_of_year = day_of_era - before;
        let month = (5 * day_of_year + 2) / 153;
        let late = i64::from(month >= 10);
        Self {
            year: era * 400 + year_of_era + late,
            month: month + 3 - 12 * late,
            day: day_of_year - (153 * month + 2) / 5 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }

    /// Seconds since 1970, if there is such a moment.
    fn seconds(self) -> Option<i64> {
        let possible = (1..=12).contains(&self.month)
            && (1..=31).contains(&self.day)
            && (0..24).contains(&self.hour)
            && (0..60).contains(&self.minute)
            && (0..60).contains(&self.second);
        let early = i64::from(self.month <= 2);
        let year = self.year - early;
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let month = self.month - 3 + 12 * early;
        let day_of_year = (153 * month + 2) / 5 + self.day - 1;
        let days = era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100
            + day_of_year
            - 719_468;
        let seconds = days * DAY_S + self.hour * 3600 + self.minute * 60 + self.second;
        // The 30th of February is no day.
        (possible && Self::of(seconds) == self).then_some(seconds)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::*;

    /// 2026-11-29, a Sunday, 16:05:09.25 UTC.
    const NOW: u64 = 1_795_968_309 * SECOND_NS + SECOND_NS / 4;

    struct Rig {
        rtc: Rtc,
        now: Arc<AtomicU64>,
    }

    fn clock(now: &Arc<AtomicU64>) -> impl Fn() -> u64 + Send + Sync + 'static {
        let now = now.clone();
        move || now.load(Ordering::SeqCst)
    }

    fn rig() -> Rig {
        let now = Arc::new(AtomicU64::new(NOW));
        let rtc = Rtc::new(clock(&now));
        Rig { rtc, now }
    }

    impl Rig {
        fn get(&self, index: u8) -> u8 {
            self.rtc.pio_write(0, index);
            self.rtc.pio_read(1)
        }

        fn put(&self, index: u8, value: u8) {
            self.rtc.pio_write(0, index);
            self.rtc.pio_write(1, value);
        }

        fn time(&self) -> [u8; 8] {
            TIME.map(|index| self.get(index))
        }

        fn pass(&self, seconds: u64) {
            self.now.fetch_add(seconds * SECOND_NS, Ordering::SeqCst);
        }
    }

    const SHOWN: [u8; 8] = [0x09, 0x05, 0x16, 1, 0x29, 0x11, 0x26, 0x20];

    #[test]
    fn it_shows_the_hosts_wall_clock_in_each_way_of_writing_numbers() {
        let rig = rig();
        assert_eq!(rig.time(), SHOWN);
        rig.put(REG_B, B_24_HOURS | B_BINARY);
        assert_eq!(rig.time(), [9, 5, 16, 1, 29, 11, 26, 20]);
        rig.put(REG_B, 0);
        assert_eq!(rig.get(HOURS), 0x04 | PM);
        rig.put(REG_B, B_BINARY);
        for (hour, shown) in [(0, 12), (1, 1), (11, 11), (12, 12 | PM), (23, 11 | PM)] {
            let midnight = NOW - NOW % (DAY_S as u64 * SECOND_NS);
            rig.now
                .store(midnight + hour * 3600 * SECOND_NS, Ordering::SeqCst);
            assert_eq!(rig.get(HOURS), shown, "{hour}");
        }
        assert_eq!(rig.get(REG_D), D_VALID);
        assert_eq!(rig.get(REG_C), 0);
        assert_eq!(rig.rtc.pio_read(0), 0xff);
    }

    #[test]
    fn a_guest_is_told_that_the_time_is_about_to_change() {
        let rig = rig();
        for (into_ns, told) in [(0, false), (999_700_000, false), (999_800_000, true)] {
            let second = NOW - NOW % SECOND_NS;
            rig.now.store(second + into_ns, Ordering::SeqCst);
            assert_eq!(rig.get(REG_A) & A_UPDATING != 0, told, "{into_ns}");
            rig.put(REG_A, 0xff);
            assert_eq!(rig.get(REG_A) & A_UPDATING != 0, told, "not the guest's");
        }
    }

    #[test]
    fn a_time_that_the_guest_sets_goes_on_from_there() {
        let rig = rig();
        rig.put(REG_B, B_24_HOURS | B_SET);
        // 1999-12-31, 23:59:58.
        let wanted = [0x58, 0x59, 0x23, 6, 0x31, 0x12, 0x99, 0x19];
        for (index, value) in TIME.into_iter().zip(wanted) {
            rig.put(index, value);
        }
        rig.pass(100);
        assert_eq!(rig.time(), wanted, "it stands still");
        rig.put(REG_B, B_24_HOURS);
        assert_eq!(rig.time(), wanted);
        rig.pass(3);
        assert_eq!(rig.time(), [0x01, 0, 0, 7, 0x01, 0x01, 0, 0x20]);
        // Also one register at a time, and never to nonsense.
        rig.put(MINUTES, 0x30);
        assert_eq!(rig.get(MINUTES), 0x30);
        for (index, value) in [(MONTH, 0x13), (DAY, 0x32), (SECONDS, 0x5f), (HOURS, 0x24)] {
            rig.put(index, value);
            assert_eq!(rig.time(), [0x01, 0x30, 0, 7, 0x01, 0x01, 0, 0x20]);
        }
    }

    #[test]
    fn it_is_right_after_a_pause_and_what_the_guest_set_and_wrote_is_kept() {
        let rig = rig();
        rig.put(0x40, 0x5a);
        rig.put(HOURS, 0x17);
        rig.rtc.pio_write(0, 0x40);
        let saved = rig.rtc.save();
        assert_eq!(saved, rig.rtc.save(), "saving changes nothing");
        rig.put(0x40, 1);
        rig.put(HOURS, 0x03);
        rig.pass(3600);
        let restored = Rtc::restore(&saved, clock(&rig.now));
        assert_eq!(restored.save(), saved);
        assert_eq!(restored.pio_read(1), 0x5a, "the index is kept");
        let rig = Rig {
            rtc: restored,
            ..rig
        };
        assert_eq!(rig.get(HOURS), 0x18);
        // In the midst of being set, too.
        rig.put(REG_B, B_24_HOURS | B_SET);
        rig.put(HOURS, 0x05);
        let saved = rig.rtc.save();
        rig.pass(7200);
        let restored = Rtc::restore(&saved, clock(&rig.now));
        assert_eq!(restored.save(), saved);
        let rig = Rig {
            rtc: restored,
            ..rig
        };
        rig.put(REG_B, B_24_HOURS);
        assert_eq!(rig.get(HOURS), 0x05);
    }

    #[test]
    fn a_state_of_another_length_is_taken_as_far_as_it_goes() {
        let rig = rig();
        for registers in [vec![], vec![0xff; 1000]] {
            let state = RtcV1 {
                index: 0xff,
                ahead_s: i64::MAX,
                set: None,
                registers,
            };
            let rtc = Rtc::restore(&state, clock(&rig.now));
            let rig = Rig {
                rtc,
                now: rig.now.clone(),
            };
            rig.time();
            rig.put(REG_B, B_24_HOURS);
            rig.put(YEAR, 0x30);
            rig.time();
        }
    }

    proptest! {
        #[test]
        fn every_second_is_a_moment_and_back(seconds in -62_000_000_000i64..250_000_000_000) {
            let moment = Moment::of(seconds);
            prop_assert_eq!(moment.seconds(), Some(seconds));
        }

        #[test]
        fn whatever_a_guest_writes_it_can_read(writes in proptest::collection::vec(any::<(u8, u8)>(), 0..64)) {
            let rig = rig();
            for (index, value) in writes {
                rig.put(index, value);
                rig.get(index);
            }
            let saved = rig.rtc.save();
            prop_assert_eq!(Rtc::restore(&saved, clock(&rig.now)).save(), saved);
        }
    }
}

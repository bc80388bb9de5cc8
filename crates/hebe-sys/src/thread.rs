//! Threads whose stacks cost what they use.

use std::thread::Builder;

/// Bytes of a stack: half of what `std` gives. A kernel that backs ordinary
/// memory with huge pages unasked (`transparent_hugepage` = `always`, as Debian
/// sets it) does so wherever 2 MiB that are aligned lie in one mapping; a usual
/// stack of 2 MiB, with whatever happens to be mapped right above it, is one
/// such place, and then takes 2 MiB instead of the 12 KiB that a thread of a
/// VMM uses. Telling the kernel to leave the whole process alone
/// (`PR_SET_THP_DISABLE`) would take huge pages from the guest's RAM as well.
pub const STACK_LEN: usize = 1 << 20;

/// A builder of a thread with such a stack, and a name.
pub fn named(name: impl Into<String>) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mapping that holds an address of this process: its length.
    fn mapping_len(address: usize) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let hex = |text: &str| usize::from_str_radix(text, 16).expect("an address");
        let ranges = maps.lines().filter_map(|line| {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            Some(hex(from)..hex(to))
        });
        let mut ranges = ranges.filter(|range| range.contains(&address));
        ranges.next().expect("a mapping").len()
    }

    #[test]
    fn no_huge_page_has_room_in_a_stack() {
        let (ready, all) = std::sync::mpsc::channel();
        // Where one ends before the next begins, they all have the same stack.
        let together = std::sync::Arc::new(std::sync::Barrier::new(8));
        let measure = move || {
            together.wait();
            let on_the_stack = 0_u8;
            ready.send(mapping_len(std::ptr::from_ref(&on_the_stack).addr()))
        };
        // Whatever lies right above one is counted with it: not above all.
        let threads: Vec<_> = (0..8)
            .map(|_| named("small").spawn(measure.clone()).expect("a thread"))
            .collect();
        drop(measure);
        for thread in threads {
            thread.join().expect("it ends").expect("heard");
        }
        let least = all.iter().min().expect("some");
        assert!((STACK_LEN..2 << 20).contains(&least), "{least}");
    }
}

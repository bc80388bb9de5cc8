//! The test guest: hand-written assembly, packed into an ELF file with a PVH
//! note when it is needed, and the view of its counters from outside.
//!
//! ```text
//! 0x0000_8000  trampoline of the other vCPUs (real mode)
//! 0x0010_0000  code                     0x0020_0000  page tables, IDT
//! 0x002f_0000  what vCPUs share         0x0030_0000  one block per vCPU
//! 0x0038_0000  working sets, 64 KiB per vCPU
//! ```
//!
//! The command line has six characters: what to do (`L` loop, `T` triple
//! fault, `R` reset, `K` reset by the keyboard controller, `P` power off), how
//! many vCPUs, the timer's period (2^(20+n) ticks), and whether (`1` or `0`)
//! to check the TSC between vCPUs, and the timer against the TSC, and whether
//! to use AVX where CPUID has it, and how long patterns are held (2^(8+n)
//! rounds of an empty loop).

use std::arch::global_asm;
use std::mem::offset_of;

use hebe_store::Segment;
use hebe_types::ByteSize;

/// Most vCPUs that the guest has room for.
pub const VCPUS_MAX: u8 = 8;
/// Least RAM that it needs.
pub const MEMORY_MIN: ByteSize = ByteSize::mib(4);

const BASE: usize = 0x10_0000;
const TRAMPOLINE: usize = 0x8000;
const PAGE_TABLES: usize = 0x20_0000;
const IDT: usize = 0x20_8000;
const SHARED: usize = 0x2f_0000;
const CPUS: usize = 0x30_0000;
const CPU_SHIFT: usize = 15;
const CPU_LEN: usize = 1 << CPU_SHIFT;
const WORK: usize = 0x38_0000;
const WORK_LEN: usize = 0x1_0000;
const WORK_PAGES: usize = WORK_LEN / 4096;
/// In the PCI window, above all BARs.
const MMIO: usize = 0xc800_0000;

const HAS_AVX: u64 = 1;
const HAS_DEADLINE: u64 = 2;
const HAS_RDTSCP: u64 = 4;

/// One vCPU's block. Its stack is at the block's end.
#[repr(C)]
struct Block {
    own_address: u64,
    cpu: u64,
    rsp: u64,
    stage: u64,
    features: u64,
    passes: u64,
    ticks: u64,
    ipis_in: u64,
    ipis_out: u64,
    token: u64,
    serial_irqs: u64,
    serial_ready: u64,
    serial_out: u64,
    ios: u64,
    halts: u64,
    spurious: u64,
    errors: u64,
    code: u64,
    found: u64,
    wanted: u64,
    detail: u64,
    hold: u64,
    hold_masked: u64,
    rounds: u64,
    deadline: u64,
    tsc: u64,
    cr0: u64,
    cr4: u64,
    owns_scratch: u64,
    busy: u64,
    work_pages: u64,
    work_sum: u64,
    seeds: [u64; WORK_PAGES],
    load: [u64; 16],
    expect: [u64; 16],
    saved: [u64; 16],
    fx: Fx,
    ymm: [u64; 32],
    fx_found: Fx,
    ymm_found: [u64; 32],
    debug: [u64; 4],
    msr: [u64; 8],
}

/// What FXSAVE writes.
#[repr(C, align(16))]
struct Fx([u64; 64]);

/// What all vCPUs share. The TSC has a cache line of its own.
#[repr(C)]
struct Shared {
    mode: u64,
    vcpus: u64,
    period: u64,
    online: u64,
    scratch: u64,
    trust_tsc: u64,
    avx: u64,
    hold: u64,
    tsc: u64,
}

const _: () = assert!(size_of::<Block>() < CPU_LEN / 2);
const _: () = assert!(CPUS + VCPUS_MAX as usize * CPU_LEN <= WORK);
const _: () = assert!(WORK + VCPUS_MAX as usize * WORK_LEN <= MEMORY_MIN.0 as usize);
const _: () = assert!(offset_of!(Block, ymm_found) == offset_of!(Block, fx_found) + 512);

global_asm!(
    include_str!("guest/entry.s"),
    include_str!("guest/handlers.s"),
    include_str!("guest/pass.s"),
    BASE = const BASE,
    TRAMPOLINE = const TRAMPOLINE,
    PAGE_TABLES = const PAGE_TABLES,
    IDT = const IDT,
    SHARED = const SHARED,
    SH_MODE = const offset_of!(Shared, mode),
    SH_VCPUS = const offset_of!(Shared, vcpus),
    SH_PERIOD = const offset_of!(Shared, period),
    SH_ONLINE = const offset_of!(Shared, online),
    SH_SCRATCH = const offset_of!(Shared, scratch),
    SH_TRUST = const offset_of!(Shared, trust_tsc),
    SH_AVX = const offset_of!(Shared, avx),
    SH_HOLD = const offset_of!(Shared, hold),
    SH_TSC = const offset_of!(Shared, tsc),
    CPUS = const CPUS,
    CPU_SHIFT = const CPU_SHIFT,
    CPU_LEN = const CPU_LEN,
    WORK = const WORK,
    WORK_LEN = const WORK_LEN,
    MMIO = const MMIO,
    HAS_AVX = const HAS_AVX,
    HAS_DEADLINE = const HAS_DEADLINE,
    HAS_RDTSCP = const HAS_RDTSCP,
    SELF = const offset_of!(Block, own_address),
    CPU = const offset_of!(Block, cpu),
    RSP = const offset_of!(Block, rsp),
    STAGE = const offset_of!(Block, stage),
    FEATURES = const offset_of!(Block, features),
    PASSES = const offset_of!(Block, passes),
    TICKS = const offset_of!(Block, ticks),
    IPIS_IN = const offset_of!(Block, ipis_in),
    IPIS_OUT = const offset_of!(Block, ipis_out),
    TOKEN = const offset_of!(Block, token),
    SERIAL_IRQS = const offset_of!(Block, serial_irqs),
    SERIAL_READY = const offset_of!(Block, serial_ready),
    SERIAL_OUT = const offset_of!(Block, serial_out),
    IOS = const offset_of!(Block, ios),
    HALTS = const offset_of!(Block, halts),
    SPURIOUS = const offset_of!(Block, spurious),
    ERRORS = const offset_of!(Block, errors),
    CODE = const offset_of!(Block, code),
    FOUND = const offset_of!(Block, found),
    WANTED = const offset_of!(Block, wanted),
    DETAIL = const offset_of!(Block, detail),
    HOLD = const offset_of!(Block, hold),
    HOLD_MASKED = const offset_of!(Block, hold_masked),
    ROUNDS = const offset_of!(Block, rounds),
    DEADLINE = const offset_of!(Block, deadline),
    TSC = const offset_of!(Block, tsc),
    CR0 = const offset_of!(Block, cr0),
    CR4 = const offset_of!(Block, cr4),
    OWNS_SCRATCH = const offset_of!(Block, owns_scratch),
    BUSY = const offset_of!(Block, busy),
    WORK_PAGES = const offset_of!(Block, work_pages),
    WORK_SUM = const offset_of!(Block, work_sum),
    SEEDS = const offset_of!(Block, seeds),
    LOAD = const offset_of!(Block, load),
    EXPECT = const offset_of!(Block, expect),
    SAVED = const offset_of!(Block, saved),
    FX = const offset_of!(Block, fx),
    YMM = const offset_of!(Block, ymm),
    FX_FOUND = const offset_of!(Block, fx_found),
    YMM_FOUND = const offset_of!(Block, ymm_found),
    DEBUG = const offset_of!(Block, debug),
    MSR = const offset_of!(Block, msr),
    E_GENERAL = const Fault::General as u64,
    E_RSP = const Fault::StackPointer as u64,
    E_X87_CONTROL = const Fault::X87Control as u64,
    E_MXCSR = const Fault::Mxcsr as u64,
    E_X87 = const Fault::X87 as u64,
    E_SSE = const Fault::Sse as u64,
    E_AVX = const Fault::Avx as u64,
    E_XCR0 = const Fault::Xcr0 as u64,
    E_DEBUG = const Fault::Debug as u64,
    E_MSR = const Fault::Msr as u64,
    E_CONTROL = const Fault::Control as u64,
    E_TSC_OWN = const Fault::TscBackwards as u64,
    E_TSC_OTHERS = const Fault::TscBehindOthers as u64,
    E_WORK = const Fault::WorkingSet as u64,
    E_TIMER_EARLY = const Fault::TimerEarly as u64,
    E_IPI_TWICE = const Fault::IpiTwice as u64,
    E_STRAY = const Fault::StrayInterrupt as u64,
    E_EXCEPTION = const Fault::Exception as u64,
    options(att_syntax)
);

unsafe extern "C" {
    static hebe_guest_start: u8;
    static hebe_guest_end: u8;
}

/// What the guest found wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u64)]
pub enum Fault {
    /// A general register; `detail` is its number (rax, rbx, rcx, rdx, rsi,
    /// rdi, rbp, r8 …). Number 0 is a port read, number 4 an MMIO read too.
    General = 1,
    /// RSP.
    StackPointer,
    /// x87 control word, status word or tags (`detail` 0, 1, 2).
    X87Control,
    /// MXCSR.
    Mxcsr,
    /// An x87 register.
    X87,
    /// An XMM register; `detail` counts quadwords.
    Sse,
    /// The upper half of a YMM register; `detail` counts quadwords.
    Avx,
    /// XCR0.
    Xcr0,
    /// A debug register.
    Debug,
    /// An MSR; `detail` is its index.
    Msr,
    /// A control register.
    Control,
    /// A vCPU's TSC went back.
    TscBackwards,
    /// A vCPU's TSC is behind one that another vCPU read before.
    TscBehindOthers,
    /// The working set changed; `detail` is the page.
    WorkingSet,
    /// The timer fired before its deadline.
    TimerEarly,
    /// An interprocessor interrupt came twice.
    IpiTwice,
    /// An interrupt that nobody asked for.
    StrayInterrupt,
    /// An exception; `detail` is its vector, `found` and `wanted` are the two
    /// words on top of its frame.
    Exception,
}

impl Fault {
    fn from_number(number: u64) -> Option<Self> {
        use Fault::*;
        [
            General,
            StackPointer,
            X87Control,
            Mxcsr,
            X87,
            Sse,
            Avx,
            Xcr0,
            Debug,
            Msr,
            Control,
            TscBackwards,
            TscBehindOthers,
            WorkingSet,
            TimerEarly,
            IpiTwice,
            StrayInterrupt,
            Exception,
        ]
        .into_iter()
        .find(|fault| *fault as u64 == number)
    }
}

/// The guest as an ELF file with a PVH note.
pub fn image() -> Vec<u8> {
    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;
    const NOTE_AT: usize = HEADER + 2 * PROGRAM_HEADER;
    const NOTE_LEN: usize = 12 + 4 + 4;
    const CODE_AT: usize = 0x1000;
    let code = code();
    let mut elf = Vec::with_capacity(CODE_AT + code.len());
    // ELF64, little-endian, version 1; executable, x86-64.
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put16(&mut elf, &[2, 62]);
    put32(&mut elf, &[1]);
    put64(&mut elf, &[BASE as u64, HEADER as u64, 0]);
    put32(&mut elf, &[0]);
    put16(
        &mut elf,
        &[HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0],
    );
    // PT_LOAD, readable, writable and executable.
    put32(&mut elf, &[1, 7]);
    let (base, len) = (BASE as u64, code.len() as u64);
    put64(&mut elf, &[CODE_AT as u64, base, base, len, len, 0x1000]);
    // PT_NOTE.
    put32(&mut elf, &[4, 4]);
    let note_len = NOTE_LEN as u64;
    put64(&mut elf, &[NOTE_AT as u64, 0, 0, note_len, note_len, 4]);
    // XEN_ELFNOTE_PHYS32_ENTRY: name and descriptor of four bytes each.
    put32(&mut elf, &[4, 4, 18]);
    elf.extend_from_slice(b"Xen\0");
    put32(&mut elf, &[BASE as u32]);
    elf.resize(CODE_AT, 0);
    elf.extend_from_slice(code);
    elf
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const hebe_guest_start, &raw const hebe_guest_end);
    let len = end as usize - start as usize;
    // SAFETY: both labels are in one read-only section, in this order, and
    // everything between them is initialised bytes of that section.
    unsafe { std::slice::from_raw_parts(start, len) }
}

fn put16(out: &mut Vec<u8>, values: &[u16]) {
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
}

fn put32(out: &mut Vec<u8>, values: &[u32]) {
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
}

fn put64(out: &mut Vec<u8>, values: &[u64]) {
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
}

/// One vCPU's counters at one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// How far it came: 1 in 64-bit mode, 2 LAPIC on, 3 all others there,
    /// 4 in the loop.
    pub stage: u64,
    /// Rounds of draw, load, hold and check.
    pub passes: u64,
    /// Timer interrupts.
    pub ticks: u64,
    /// Interprocessor interrupts taken.
    pub ipis_in: u64,
    /// Interprocessor interrupts sent.
    pub ipis_out: u64,
    /// The vCPU has the token and has not sent it on.
    pub token: u64,
    /// Serial interrupts (vCPU 0).
    pub serial_irqs: u64,
    /// Bytes written to the serial port (vCPU 0).
    pub serial_out: u64,
    /// Rounds of port write, port read, MMIO read.
    pub ios: u64,
    /// HLTs.
    pub halts: u64,
    /// Spurious interrupts, which are allowed.
    pub spurious: u64,
    /// Pages of the working set verified.
    pub work_pages: u64,
    /// Errors found.
    pub errors: u64,
    /// Features that it tests: 1 AVX, 2 TSC deadline, 4 TSC_AUX.
    pub features: u64,
}

impl Counters {
    /// AVX registers are part of the patterns.
    pub fn tests_avx(&self) -> bool {
        self.features & HAS_AVX != 0
    }

    /// The timer is in TSC-deadline mode; otherwise it counts down once.
    pub fn tests_deadline(&self) -> bool {
        self.features & HAS_DEADLINE != 0
    }
}

/// The first error that a vCPU found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FirstError {
    /// What, if the number is known.
    pub fault: Option<Fault>,
    /// The value found.
    pub found: u64,
    /// The value wanted.
    pub wanted: u64,
    /// Where; see [`Fault`].
    pub detail: u64,
}

/// Looks at the guest's memory through the segment's mapping. For tests only:
/// the product never reads guest RAM.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    segment: &'a Segment,
}

impl<'a> View<'a> {
    /// # Panics
    /// If the segment has less than [`MEMORY_MIN`] of RAM.
    pub fn new(segment: &'a Segment) -> Self {
        let ram = &segment.ram()[0];
        assert!(ram.gpa.0 == 0 && ram.len >= MEMORY_MIN.bytes());
        Self { segment }
    }

    fn word(&self, address: usize) -> u64 {
        assert!(address.is_multiple_of(8) && address < MEMORY_MIN.0 as usize);
        let at = self.segment.ram()[0].host.as_ptr().wrapping_add(address);
        // SAFETY: inside the first range of RAM (checked), which is mapped as
        // long as the segment is borrowed; aligned. The guest may change it at
        // any time, hence volatile.
        unsafe { at.cast::<u64>().read_volatile() }
    }

    fn field(&self, cpu: u8, offset: usize) -> u64 {
        self.word(CPUS + usize::from(cpu) * CPU_LEN + offset)
    }

    /// One vCPU's counters.
    pub fn counters(&self, cpu: u8) -> Counters {
        let field = |offset| self.field(cpu, offset);
        Counters {
            stage: field(offset_of!(Block, stage)),
            passes: field(offset_of!(Block, passes)),
            ticks: field(offset_of!(Block, ticks)),
            ipis_in: field(offset_of!(Block, ipis_in)),
            ipis_out: field(offset_of!(Block, ipis_out)),
            token: field(offset_of!(Block, token)),
            serial_irqs: field(offset_of!(Block, serial_irqs)),
            serial_out: field(offset_of!(Block, serial_out)),
            ios: field(offset_of!(Block, ios)),
            halts: field(offset_of!(Block, halts)),
            spurious: field(offset_of!(Block, spurious)),
            work_pages: field(offset_of!(Block, work_pages)),
            errors: field(offset_of!(Block, errors)),
            features: field(offset_of!(Block, features)),
        }
    }

    /// The first error of a vCPU, if it found one.
    pub fn first_error(&self, cpu: u8) -> Option<FirstError> {
        let field = |offset| self.field(cpu, offset);
        (field(offset_of!(Block, errors)) > 0).then(|| FirstError {
            fault: Fault::from_number(field(offset_of!(Block, code))),
            found: field(offset_of!(Block, found)),
            wanted: field(offset_of!(Block, wanted)),
            detail: field(offset_of!(Block, detail)),
        })
    }

    /// Verifies a *stopped* vCPU's whole working set; returns the pages
    /// verified, or the first bad one.
    pub fn verify_work(&self, cpu: u8) -> Result<usize, usize> {
        let busy = self.field(cpu, offset_of!(Block, busy)) as usize;
        let mut verified = 0;
        for page in 0..WORK_PAGES {
            let mut seed = self.field(cpu, offset_of!(Block, seeds) + 8 * page);
            if seed == 0 || busy == page + 1 {
                continue;
            }
            let start = WORK + usize::from(cpu) * WORK_LEN + page * 4096;
            let fits = (0..512).all(|i| self.word(start + 8 * i) == splitmix64(&mut seed));
            if !fits {
                return Err(page);
            }
            verified += 1;
        }
        Ok(verified)
    }
}

/// The next number of a sequence; the guest computes the same.
pub fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_an_elf_with_a_pvh_note_and_the_code() {
        let image = image();
        assert_eq!(&image[..4], b"\x7fELF");
        assert!(image.windows(4).any(|w| w == b"Xen\0"));
        assert_eq!(&image[0x1000..], code());
        assert!(BASE + code().len() <= PAGE_TABLES);
    }

    #[test]
    fn every_fault_has_its_number() {
        assert_eq!(Fault::from_number(1), Some(Fault::General));
        assert_eq!(Fault::from_number(18), Some(Fault::Exception));
        assert_eq!(Fault::from_number(0), None);
        assert_eq!(Fault::from_number(19), None);
    }
}

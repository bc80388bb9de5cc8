# What each vCPU does for ever: draw new patterns, load them into every
# register it can, hold them while I/O and interrupts go on, check them.

.pushsection .rodata.hebe_guest, "a", @progbits
.code64

# Next of a splitmix64 sequence: state %rbx, result %rax. Clobbers %rcx.
next:
    movabsq $0x9e3779b97f4a7c15, %rax
    addq %rax, %rbx
    movq %rbx, %rax
    movq %rax, %rcx
    shrq $30, %rcx
    xorq %rcx, %rax
    movabsq $0xbf58476d1ce4e5b9, %rcx
    imulq %rcx, %rax
    movq %rax, %rcx
    shrq $27, %rcx
    xorq %rcx, %rax
    movabsq $0x94d049bb133111eb, %rcx
    imulq %rcx, %rax
    movq %rax, %rcx
    shrq $31, %rcx
    xorq %rcx, %rax
    ret

# %rax found, %rcx wanted, %r8 where.
.macro CHECK code
    cmpq %rcx, %rax
    je 9f
    movq %rax, %rsi
    movq %rcx, %rdx
    movl $\code, %edi
    call record
9:
.endm

cpu_main:
    movq %cr0, %rax
    movq %rax, %gs:{CR0}
    movq %cr4, %rax
    movq %rax, %gs:{CR4}
    # Timer: vector 0x40, one-shot or TSC deadline.
    movl $0x832, %ecx
    movl $0x40, %eax
    xorl %edx, %edx
    testq ${HAS_DEADLINE}, %gs:{FEATURES}
    jz 1f
    movl $0x40040, %eax
1:  wrmsr
    movl $0x83e, %ecx                   # divide by 1
    movl $0xb, %eax
    wrmsr
    mfence
    call arm_timer
    cmpq $0, %gs:{CPU}
    jne 2f
    # Serial port: IOAPIC pin 4, edge, vector 0x60, to vCPU 0.
    movl $0xfec00000, %edi
    movl $0x19, (%rdi)
    movl $0, 16(%rdi)
    movl $0x18, (%rdi)
    movl $0x60, 16(%rdi)
    movw $0x3f9, %dx
    movb $2, %al                        # interrupt when the transmitter is empty
    outb %al, %dx
    movq $1, %gs:{SERIAL_READY}
    movq $1, %gs:{TOKEN}
2:  sti

pass:
    movq $4, %gs:{STAGE}
    # A sequence that no other pass and no other vCPU has.
    movq %gs:{PASSES}, %rbx
    shlq $8, %rbx
    orq %gs:{CPU}, %rbx
    call draw_general
    call draw_floating
    call draw_rest
    call load_rest
    call send_token
    call send_byte
    call load_floating
    jmp hold
checked_general:
    call check_floating
    call check_rest
    call send_token
    call check_clock
    call check_work
    # Give the serial scratch register back.
    cmpq $0, %gs:{OWNS_SCRATCH}
    je 1f
    movq $0, %gs:{OWNS_SCRATCH}
    movl $0, {SHARED} + {SH_SCRATCH}
1:  movq %rsp, %rax
    movq %gs:{RSP}, %rcx
    xorl %r8d, %r8d
    CHECK {E_RSP}
    incq %gs:{PASSES}
    jmp pass

# ---- general registers and I/O ----
draw_general:
    movq %gs:{SELF}, %rdi
    addq ${LOAD}, %rdi
    movl $15, %edx
1:  call next
    stosq
    decl %edx
    jnz 1b
    # %rdx holds a port in its low half: the serial scratch register for one
    # vCPU at a time, one that nobody answers for the others.
    movl $1, %eax
    xchgl %eax, {SHARED} + {SH_SCRATCH}
    testl %eax, %eax
    jnz 2f
    movq $1, %gs:{OWNS_SCRATCH}
    movw $0x3ff, %gs:{LOAD} + 8 * 3
    jmp 3f
2:  movw $0x510, %gs:{LOAD} + 8 * 3
    movb $0xff, %gs:{LOAD}              # %al: what a floating bus reads as
3:  # %rbx holds an unassigned address in the PCI window.
    call next
    andl $0x00fffff8, %eax
    addl ${MMIO}, %eax
    movq %rax, %gs:{LOAD} + 8 * 1
    # Expected afterwards: the same, and ones in %rsi.
    movq %gs:{SELF}, %rsi
    leaq {EXPECT}(%rsi), %rdi
    addq ${LOAD}, %rsi
    movl $15, %ecx
    rep movsq
    movl $0xffffffff, %eax
    movq %rax, %gs:{EXPECT} + 8 * 4
    movl {SHARED} + {SH_HOLD}, %eax
    movq %rax, %gs:{HOLD}
    shrl $2, %eax
    movq %rax, %gs:{HOLD_MASKED}
    movq $8, %gs:{ROUNDS}
    ret

hold:
    movq %gs:{LOAD} + 8 * 0, %rax
    movq %gs:{LOAD} + 8 * 1, %rbx
    movq %gs:{LOAD} + 8 * 2, %rcx
    movq %gs:{LOAD} + 8 * 3, %rdx
    movq %gs:{LOAD} + 8 * 4, %rsi
    movq %gs:{LOAD} + 8 * 5, %rdi
    movq %gs:{LOAD} + 8 * 6, %rbp
    movq %gs:{LOAD} + 8 * 7, %r8
    movq %gs:{LOAD} + 8 * 8, %r9
    movq %gs:{LOAD} + 8 * 9, %r10
    movq %gs:{LOAD} + 8 * 10, %r11
    movq %gs:{LOAD} + 8 * 11, %r12
    movq %gs:{LOAD} + 8 * 12, %r13
    movq %gs:{LOAD} + 8 * 13, %r14
    movq %gs:{LOAD} + 8 * 14, %r15
    # Interrupts on. No register is free: the count is in memory.
1:  decq %gs:{HOLD}
    jnz 1b
    # I/O: a read left out, or a write gone, shows. Several rounds, so that a
    # suspend often falls between two of them.
4:  outb %al, %dx
    notb %al
    inb %dx, %al
    notl %esi
    movl (%rbx), %esi
    incq %gs:{IOS}
    decq %gs:{ROUNDS}
    jnz 4b
    # Interrupts off: they pile up, pending.
    cli
2:  decq %gs:{HOLD_MASKED}
    jnz 2b
    testb $7, %gs:{PASSES}
    jnz 3f
    incq %gs:{HALTS}
    sti
    hlt
3:  sti
    nop
    movq %rax, %gs:{SAVED} + 8 * 0
    movq %rbx, %gs:{SAVED} + 8 * 1
    movq %rcx, %gs:{SAVED} + 8 * 2
    movq %rdx, %gs:{SAVED} + 8 * 3
    movq %rsi, %gs:{SAVED} + 8 * 4
    movq %rdi, %gs:{SAVED} + 8 * 5
    movq %rbp, %gs:{SAVED} + 8 * 6
    movq %r8, %gs:{SAVED} + 8 * 7
    movq %r9, %gs:{SAVED} + 8 * 8
    movq %r10, %gs:{SAVED} + 8 * 9
    movq %r11, %gs:{SAVED} + 8 * 10
    movq %r12, %gs:{SAVED} + 8 * 11
    movq %r13, %gs:{SAVED} + 8 * 12
    movq %r14, %gs:{SAVED} + 8 * 13
    movq %r15, %gs:{SAVED} + 8 * 14
    xorl %r8d, %r8d
    movq %gs:{SELF}, %r9
5:  movq {SAVED}(%r9,%r8,8), %rax
    movq {EXPECT}(%r9,%r8,8), %rcx
    CHECK {E_GENERAL}
    incl %r8d
    cmpl $15, %r8d
    jb 5b
    jmp checked_general

# ---- x87, SSE, AVX ----
draw_floating:
    movq %gs:{SELF}, %r9
    leaq {FX}(%r9), %rdi
    # Rounding modes and the top of the x87 stack vary, nothing traps.
    call next
    movl %eax, %edx
    andl $0x0c00, %edx
    orl $0x037f, %edx
    movl %edx, (%rdi)
    shrl $13, %eax
    movl %eax, %edx
    andl $0x3800, %edx
    movw %dx, 2(%rdi)
    movq $0xff, 4(%rdi)
    movq $0, 12(%rdi)
    movl %eax, %edx
    andl $0x6000, %edx
    orl $0x1f80, %edx
    movl %edx, 24(%rdi)
    movl $0, 28(%rdi)
    addq $32, %rdi
    movl $8, %edx                       # x87: normal numbers
1:  call next
    btsq $63, %rax
    stosq
    call next
    andl $0x3fff, %eax
    stosq
    decl %edx
    jnz 1b
    movl $32, %edx                      # SSE
2:  call next
    stosq
    decl %edx
    jnz 2b
    leaq {YMM}(%r9), %rdi
    movl $32, %edx                      # upper halves
3:  call next
    stosq
    decl %edx
    jnz 3b
    ret

.macro UPPER_LOAD n
    vinsertf128 $1, {YMM} + 16 * \n(%r9), %ymm\n, %ymm\n
.endm
.macro UPPER_SAVE n
    vextractf128 $1, %ymm\n, {YMM_FOUND} + 16 * \n(%r9)
.endm

load_floating:
    movq %gs:{SELF}, %r9
    fxrstor64 {FX}(%r9)
    testq ${HAS_AVX}, %gs:{FEATURES}
    jz 1f
.irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    UPPER_LOAD \n
.endr
1:  ret

check_floating:
    movq %gs:{SELF}, %r9
    leaq {FX_FOUND}(%r9), %rdi
    movl $0x33333333, %eax
    movl $((512 + 256) / 4), %ecx
    rep stosl
    fxsave64 {FX_FOUND}(%r9)
    movzwl {FX_FOUND}(%r9), %eax
    movzwl {FX}(%r9), %ecx
    xorl %r8d, %r8d
    CHECK {E_X87_CONTROL}
    movzwl {FX_FOUND} + 2(%r9), %eax
    movzwl {FX} + 2(%r9), %ecx
    incl %r8d
    CHECK {E_X87_CONTROL}
    movzbl {FX_FOUND} + 4(%r9), %eax
    movzbl {FX} + 4(%r9), %ecx
    incl %r8d
    CHECK {E_X87_CONTROL}
    movl {FX_FOUND} + 24(%r9), %eax
    movl {FX} + 24(%r9), %ecx
    CHECK {E_MXCSR}
    xorl %r8d, %r8d
1:  movl %r8d, %r10d
    shll $4, %r10d
    movq {FX_FOUND} + 32(%r9,%r10), %rax
    movq {FX} + 32(%r9,%r10), %rcx
    CHECK {E_X87}
    movzwl {FX_FOUND} + 40(%r9,%r10), %eax
    movzwl {FX} + 40(%r9,%r10), %ecx
    CHECK {E_X87}
    incl %r8d
    cmpl $8, %r8d
    jb 1b
    xorl %r8d, %r8d
2:  movq {FX_FOUND} + 160(%r9,%r8,8), %rax
    movq {FX} + 160(%r9,%r8,8), %rcx
    CHECK {E_SSE}
    incl %r8d
    cmpl $32, %r8d
    jb 2b
    testq ${HAS_AVX}, %gs:{FEATURES}
    jz 4f
.irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    UPPER_SAVE \n
.endr
    xorl %r8d, %r8d
3:  movq {YMM_FOUND}(%r9,%r8,8), %rax
    movq {YMM}(%r9,%r8,8), %rcx
    CHECK {E_AVX}
    incl %r8d
    cmpl $32, %r8d
    jb 3b
    xorl %ecx, %ecx
    xgetbv
    movl $7, %ecx
    xorl %r8d, %r8d
    CHECK {E_XCR0}
4:  ret

# ---- debug registers, MSRs, control registers ----
# Index and the bits that may vary. FS_BASE, KERNEL_GS_BASE, STAR, LSTAR,
# SFMASK, TSC_AUX (only with RDTSCP; last).
.balign 8
msr_table:
    .quad 0xc0000100, 0x00007fffffffffff
    .quad 0xc0000102, 0x00007fffffffffff
    .quad 0xc0000081, 0x7fffffffffffffff
    .quad 0xc0000082, 0x00007fffffffffff
    .quad 0xc0000084, 0x0000000000077fd5
    .quad 0xc0000103, 0x00000000ffffffff
.set MSRS, 6

draw_rest:
    movq %gs:{SELF}, %r9
    leaq {DEBUG}(%r9), %rdi
    movabsq $0x00007fffffffffff, %rsi
    movl $4, %edx
1:  call next
    andq %rsi, %rax
    stosq
    decl %edx
    jnz 1b
    leaq {MSR}(%r9), %rdi
    leaq msr_table(%rip), %rsi
    movl $MSRS, %edx
2:  call next
    andq 8(%rsi), %rax
    addq $16, %rsi
    stosq
    decl %edx
    jnz 2b
    ret

# %r10d = how many MSRs of the table there are.
count_msrs:
    movl $MSRS, %r10d
    testq ${HAS_RDTSCP}, %gs:{FEATURES}
    jnz 1f
    decl %r10d
1:  ret

load_rest:
    movq %gs:{SELF}, %r9
    movq {DEBUG}(%r9), %rax
    movq %rax, %dr0
    movq {DEBUG} + 8(%r9), %rax
    movq %rax, %dr1
    movq {DEBUG} + 16(%r9), %rax
    movq %rax, %dr2
    movq {DEBUG} + 24(%r9), %rax
    movq %rax, %dr3
    call count_msrs
    leaq msr_table(%rip), %rsi
    xorl %r8d, %r8d
1:  movl (%rsi), %ecx
    movq {MSR}(%r9,%r8,8), %rax
    movq %rax, %rdx
    shrq $32, %rdx
    wrmsr
    addq $16, %rsi
    incl %r8d
    cmpl %r10d, %r8d
    jb 1b
    ret

.macro CHECK_DEBUG n
    movq %dr\n, %rax
    movq {DEBUG} + 8 * \n(%r9), %rcx
    movl $\n, %r8d
    CHECK {E_DEBUG}
.endm

check_rest:
    movq %gs:{SELF}, %r9
    CHECK_DEBUG 0
    CHECK_DEBUG 1
    CHECK_DEBUG 2
    CHECK_DEBUG 3
    movq %dr7, %rax
    movl $0x400, %ecx
    movl $7, %r8d
    CHECK {E_DEBUG}
    call count_msrs
    leaq msr_table(%rip), %r11
    xorl %r14d, %r14d
1:  movl (%r11), %ecx
    movl %ecx, %r8d
    rdmsr
    shlq $32, %rdx
    orq %rdx, %rax
    movq {MSR}(%r9,%r14,8), %rcx
    CHECK {E_MSR}
    addq $16, %r11
    incl %r14d
    cmpl %r10d, %r14d
    jb 1b
    movl $0xc0000101, %ecx
    movl %ecx, %r8d
    rdmsr
    shlq $32, %rdx
    orq %rdx, %rax
    movq %gs:{SELF}, %rcx
    CHECK {E_MSR}
    movq %cr0, %rax
    movq %gs:{CR0}, %rcx
    xorl %r8d, %r8d
    CHECK {E_CONTROL}
    movq %cr3, %rax
    movl ${PAGE_TABLES}, %ecx
    movl $3, %r8d
    CHECK {E_CONTROL}
    movq %cr4, %rax
    movq %gs:{CR4}, %rcx
    movl $4, %r8d
    CHECK {E_CONTROL}
    movl $0x808, %ecx                   # task priority
    movl %ecx, %r8d
    rdmsr
    movl $0x10, %ecx
    CHECK {E_MSR}
    ret

# ---- interrupts to others, serial output ----
send_token:
    cmpq $0, %gs:{TOKEN}
    je 2f
    movq $0, %gs:{TOKEN}
    incq %gs:{IPIS_OUT}
    movq %gs:{CPU}, %rdx
    incl %edx
    cmpl {SHARED} + {SH_VCPUS}, %edx
    jb 1f
    xorl %edx, %edx
1:  movl $0x50, %eax
    movl $0x830, %ecx
    mfence
    wrmsr
2:  ret

# vCPU 0 writes a sequence of bytes, each after the interrupt for the last.
send_byte:
    cmpq $0, %gs:{SERIAL_READY}
    je 1f
    movq $0, %gs:{SERIAL_READY}
    movq %gs:{SERIAL_OUT}, %rax
    incq %gs:{SERIAL_OUT}
    andl $63, %eax
    addl $0x30, %eax
    movw $0x3f8, %dx
    outb %al, %dx
1:  ret

# ---- time never goes back, here or between vCPUs ----
check_clock:
    movq {SHARED} + {SH_TSC}, %r9
    call read_tsc
    xorl %r8d, %r8d
    movq %rax, %rsi
    movq %gs:{TSC}, %rdx
    movq %rax, %gs:{TSC}
    cmpq %rdx, %rsi
    jae 1f
    movl ${E_TSC_OWN}, %edi
    call record
1:  cmpl $0, {SHARED} + {SH_TRUST}
    je 2f
    movq %r9, %rdx
    cmpq %rdx, %rsi
    jae 2f
    movl ${E_TSC_OTHERS}, %edi
    call record
2:  movq %r9, %rax
3:  cmpq %rax, %rsi
    jbe 4f
    lock cmpxchgq %rsi, {SHARED} + {SH_TSC}
    jne 3b
4:  ret

# ---- a working set that is verified and rewritten, a page each pass ----
# SEEDS[i] is 0 before page i was written first. BUSY is i + 1 while it is
# being rewritten, so that a look from outside passes it over.
check_work:
    movq %gs:{PASSES}, %r8
    andl $(({WORK_LEN} >> 12) - 1), %r8d
    movq %gs:{CPU}, %r9
    imulq ${WORK_LEN}, %r9
    movl %r8d, %eax
    shll $12, %eax
    leaq {WORK}(%r9,%rax), %r9          # the page
    movq %gs:{SELF}, %r10
    movq %rbx, %r12                     # the pass's own sequence
    movq {SEEDS}(%r10,%r8,8), %rbx
    testq %rbx, %rbx
    jz 2f
    xorl %r11d, %r11d
1:  call next
    movq %rax, %rcx
    movq (%r9,%r11,8), %rax
    addq %rax, %gs:{WORK_SUM}
    CHECK {E_WORK}
    incl %r11d
    cmpl $512, %r11d
    jb 1b
    incq %gs:{WORK_PAGES}
2:  leaq 1(%r8), %rax
    movq %rax, %gs:{BUSY}
    movq %r12, %rbx
    call next
    orq $1, %rax
    movq %rax, {SEEDS}(%r10,%r8,8)
    movq %rax, %rbx
    xorl %r11d, %r11d
3:  call next
    movq %rax, (%r9,%r11,8)
    incl %r11d
    cmpl $512, %r11d
    jb 3b
    movq $0, %gs:{BUSY}
    ret

.globl hebe_guest_end
hebe_guest_end:
.popsection

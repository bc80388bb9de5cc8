# From the PVH entry to 64-bit code on every processor. AT&T syntax.
#
# The bytes between hebe_guest_start and hebe_guest_end are copied to {BASE};
# addresses that are not relative are built from label differences.

.set CODE32, 0x08
.set DATA, 0x10
.set CODE64, 0x18

.pushsection .rodata.hebe_guest, "a", @progbits
.balign 16
.globl hebe_guest_start
hebe_guest_start:

# ---- first processor: 32-bit, paging off, %ebx = PVH start info ----
.code32
guest_entry32:
    cli
    cld
    lgdt gdt_pointer - hebe_guest_start + {BASE}
    ljmp $CODE32, $(first32 - hebe_guest_start + {BASE})
first32:
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    # Page tables, IDT, counters: a reset finds old bytes there.
    movl ${PAGE_TABLES}, %edi
    movl $(({WORK} - {PAGE_TABLES}) / 4), %ecx
    xorl %eax, %eax
    rep stosl
    # The command line: what to do, number of vCPUs, timer period, whether to
    # trust the TSC, whether to use AVX, how long to hold.
    movl 24(%ebx), %esi
    movzbl (%esi), %eax
    movl %eax, {SHARED} + {SH_MODE}
    movzbl 1(%esi), %eax
    subl $0x30, %eax
    movl %eax, {SHARED} + {SH_VCPUS}
    movzbl 2(%esi), %ecx
    subl $(0x30 - 20), %ecx
    movl $1, %eax
    shll %cl, %eax
    movl %eax, {SHARED} + {SH_PERIOD}
    movzbl 3(%esi), %eax
    subl $0x30, %eax
    movl %eax, {SHARED} + {SH_TRUST}
    movzbl 4(%esi), %eax
    subl $0x30, %eax
    movl %eax, {SHARED} + {SH_AVX}
    movzbl 5(%esi), %ecx
    subl $(0x30 - 8), %ecx
    movl $1, %eax
    shll %cl, %eax
    movl %eax, {SHARED} + {SH_HOLD}
    # Identity map of 4 GiB in 2 MiB pages.
    movl $({PAGE_TABLES} + 0x1003), {PAGE_TABLES}
    movl $({PAGE_TABLES} + 0x2003), {PAGE_TABLES} + 0x1000
    movl $({PAGE_TABLES} + 0x3003), {PAGE_TABLES} + 0x1008
    movl $({PAGE_TABLES} + 0x4003), {PAGE_TABLES} + 0x1010
    movl $({PAGE_TABLES} + 0x5003), {PAGE_TABLES} + 0x1018
    movl $({PAGE_TABLES} + 0x2000), %edi
    movl $0x83, %eax
1:  movl %eax, (%edi)
    addl $8, %edi
    addl $0x200000, %eax
    jnc 1b
    # Trampoline of the others.
    movl $(ap_start - hebe_guest_start + {BASE}), %esi
    movl ${TRAMPOLINE}, %edi
    movl $(ap_end - ap_start), %ecx
    rep movsb

to_long_mode:
    movl $0x620, %eax                   # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl ${PAGE_TABLES}, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax                    # LME
    wrmsr
    movl $0x80000033, %eax              # PG, NE, ET, MP, PE
    movl %eax, %cr0
    ljmp $CODE64, $(long_mode - hebe_guest_start + {BASE})

.balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00af9b000000ffff
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt - hebe_guest_start + {BASE}

# ---- the others: real mode at {TRAMPOLINE} after SIPI ----
.code16
.balign 16
ap_start:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl ap_gdt_pointer - ap_start + {TRAMPOLINE}
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $CODE32, $(ap32 - hebe_guest_start + {BASE})
.balign 4
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt - hebe_guest_start + {BASE}
ap_end:

.code32
ap32:
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    jmp to_long_mode

# ---- all: 64-bit ----
.code64
long_mode:
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    # x2APIC, whose id says who this is.
    movl $0x1b, %ecx
    rdmsr
    orl $0xc00, %eax
    wrmsr
    movl $0x802, %ecx
    rdmsr
    movl %eax, %r12d
    movl %eax, %edi
    shlq ${CPU_SHIFT}, %rdi
    addq ${CPUS}, %rdi                  # this processor's block
    leaq {CPU_LEN}(%rdi), %rsp
    movl $0xc0000101, %ecx              # GS_BASE
    movl %edi, %eax
    xorl %edx, %edx
    wrmsr
    movq %rdi, %gs:{SELF}
    movq %r12, %gs:{CPU}
    movq %rsp, %gs:{RSP}
    movq $1, %gs:{STAGE}
    testl %r12d, %r12d
    jnz 1f
    call build_idt
1:  lidt idt_pointer(%rip)
    call detect
    movl $0x80f, %ecx                   # software enable, spurious vector 0xff
    movl $0x1ff, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x10000, %eax                 # LINT0, LINT1 masked
    movl $0x835, %ecx
    wrmsr
    movl $0x836, %ecx
    wrmsr
    # A task priority, set by MSR: QEMU 10 aborts when a nested guest writes
    # CR8 while an interrupt is pending.
    movl $0x10, %eax
    movl $0x808, %ecx
    wrmsr
    movq $2, %gs:{STAGE}
    lock incq {SHARED} + {SH_ONLINE}
    testl %r12d, %r12d
    jnz wait_for_all
    movl {SHARED} + {SH_VCPUS}, %eax
    cmpl $1, %eax
    je wait_for_all
    # INIT, then SIPI twice, to all but self.
    movl $0x830, %ecx
    movl $0xc4500, %eax
    xorl %edx, %edx
    wrmsr
    call wait_a_little
    movl $0x830, %ecx
    movl $(0xc4600 + ({TRAMPOLINE} >> 12)), %eax
    xorl %edx, %edx
    wrmsr
    call wait_a_little
    movl {SHARED} + {SH_VCPUS}, %eax
    cmpl %eax, {SHARED} + {SH_ONLINE}
    jae wait_for_all
    movl $0x830, %ecx
    movl $(0xc4600 + ({TRAMPOLINE} >> 12)), %eax
    xorl %edx, %edx
    wrmsr
wait_for_all:
    pause
    movl {SHARED} + {SH_VCPUS}, %eax
    cmpl %eax, {SHARED} + {SH_ONLINE}
    jb wait_for_all
    movq $3, %gs:{STAGE}
    testl %r12d, %r12d
    jnz begin
    # How it ends, if the command line says so.
    movl {SHARED} + {SH_MODE}, %eax
    cmpl $'T', %eax
    je triple_fault
    cmpl $'R', %eax
    je reset
    cmpl $'K', %eax
    je keyboard_reset
    cmpl $'P', %eax
    je power_off
begin:
    jmp cpu_main

triple_fault:
    lidt null_idt_pointer(%rip)
    int3
reset:
    movw $0x602, %dx
    movb $1, %al
    outb %al, %dx
    jmp stop
keyboard_reset:
    movb $0xfe, %al
    outb %al, $0x64
    jmp stop
power_off:
    movw $0x600, %dx
    movb $((5 << 2) | 0x20), %al
    outb %al, %dx
stop:
    cli
    hlt
    jmp stop

# About a million ticks of the TSC.
wait_a_little:
    call read_tsc
    leaq 0x100000(%rax), %rbx
1:  pause
    call read_tsc
    cmpq %rbx, %rax
    jb 1b
    ret

# AVX where CPUID has it, and how the timer works.
detect:
    movl $1, %eax
    xorl %ecx, %ecx
    cpuid
    xorl %r13d, %r13d
    btl $24, %ecx
    jnc 1f
    testl $1, %r12d                     # odd vCPUs use the count, to test both
    jnz 1f
    orl ${HAS_DEADLINE}, %r13d
1:  cmpl $0, {SHARED} + {SH_AVX}
    je 2f
    movl %ecx, %eax
    andl $(1 << 26 | 1 << 28), %eax     # XSAVE, AVX
    cmpl $(1 << 26 | 1 << 28), %eax
    jne 2f
    movq %cr4, %rax
    orl $(1 << 18), %eax                # OSXSAVE
    movq %rax, %cr4
    movl $7, %eax                       # x87, SSE, AVX
    xorl %edx, %edx
    xorl %ecx, %ecx
    xsetbv
    orl ${HAS_AVX}, %r13d
2:  movl $0x80000000, %eax
    cpuid
    cmpl $0x80000001, %eax
    jb 3f
    movl $0x80000001, %eax
    cpuid
    btl $27, %edx                       # RDTSCP, and so TSC_AUX
    jnc 3f
    orl ${HAS_RDTSCP}, %r13d
3:  movq %r13, %gs:{FEATURES}
    ret

# 256 gates to stubs, and the four that are used.
build_idt:
    leaq stubs(%rip), %rax
    movl ${IDT}, %edi
    movl $256, %ecx
1:  call put_gate
    addq $16, %rax
    decl %ecx
    jnz 1b
    leaq on_timer(%rip), %rax
    movl $({IDT} + 16 * 0x40), %edi
    call put_gate
    leaq on_ipi(%rip), %rax
    movl $({IDT} + 16 * 0x50), %edi
    call put_gate
    leaq on_serial(%rip), %rax
    movl $({IDT} + 16 * 0x60), %edi
    call put_gate
    leaq on_spurious(%rip), %rax
    movl $({IDT} + 16 * 0xff), %edi
    jmp put_gate

# Interrupt gate to %rax at %rdi; moves %rdi on.
put_gate:
    movw %ax, (%rdi)
    movw $CODE64, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    movq %rax, %rdx
    shrq $16, %rdx
    movw %dx, 6(%rdi)
    shrq $16, %rdx
    movl %edx, 8(%rdi)
    movl $0, 12(%rdi)
    addq $16, %rdi
    ret

idt_pointer:
    .word 16 * 256 - 1
    .quad {IDT}
null_idt_pointer:
    .word 0
    .quad 0
.popsection

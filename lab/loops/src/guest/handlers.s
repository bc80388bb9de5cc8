# Interrupts and exceptions. Handlers change no register that they do not
# put back: the patterns in them are being held.

.pushsection .rodata.hebe_guest, "a", @progbits
.code64
# One stub of 16 bytes per vector; the return address tells which.
.balign 16
stubs:
.rept 256
    .balign 16
    call stub_common
.endr
.balign 16

stub_common:
    pushq %rdi
    movq 8(%rsp), %rdi
    pushq %rsi
    leaq stubs + 5(%rip), %rsi
    subq %rsi, %rdi
    shrq $4, %rdi                       # the vector
    cmpl $32, %edi
    jb exception
    # An interrupt that nobody asked for.
    pushq %rdx
    pushq %r8
    movq %rdi, %rsi
    xorl %edx, %edx
    xorl %r8d, %r8d
    movl ${E_STRAY}, %edi
    call record
    call end_of_interrupt
    popq %r8
    popq %rdx
    popq %rsi
    popq %rdi
    addq $8, %rsp
    iretq

# The error code, if there is one, lies between the stub's return address and
# RIP: both words go into the record.
exception:
    movq %rdi, %r8
    movq 24(%rsp), %rsi
    movq 32(%rsp), %rdx
    movl ${E_EXCEPTION}, %edi
    call record
    movq $0xdead, %gs:{STAGE}
    jmp stop

on_spurious:
    incq %gs:{SPURIOUS}
    iretq

end_of_interrupt:
    pushq %rax
    pushq %rcx
    pushq %rdx
    movl $0x80b, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    popq %rdx
    popq %rcx
    popq %rax
    ret

# The timer is one-shot: it is dead for ever if one is lost.
on_timer:
    pushq %rdi
    pushq %rsi
    pushq %rdx
    pushq %r8
    pushq %rax
    pushq %rcx
    incq %gs:{TICKS}
    testq ${HAS_DEADLINE}, %gs:{FEATURES}
    jz 1f
    cmpl $0, {SHARED} + {SH_TRUST}
    je 1f
    call read_tsc
    movq %rax, %rsi
    movq %gs:{DEADLINE}, %rdx
    movl {SHARED} + {SH_PERIOD}, %ecx
    shrl $4, %ecx                       # slack: what calibrations may differ by
    subq %rcx, %rdx
    xorl %r8d, %r8d
    cmpq %rdx, %rsi
    jae 1f
    movl ${E_TIMER_EARLY}, %edi
    call record
1:  call arm_timer
    call end_of_interrupt
    popq %rcx
    popq %rax
    popq %r8
    popq %rdx
    popq %rsi
    popq %rdi
    iretq

# Clobbers %rax, %rcx, %rdx.
arm_timer:
    testq ${HAS_DEADLINE}, %gs:{FEATURES}
    jz 1f
    call read_tsc
    movl {SHARED} + {SH_PERIOD}, %ecx
    addq %rcx, %rax
    movq %rax, %gs:{DEADLINE}
    movq %rax, %rdx
    shrq $32, %rdx
    movl $0x6e0, %ecx
    wrmsr
    ret
1:  movl $0x838, %ecx
    movl {SHARED} + {SH_PERIOD}, %eax
    xorl %edx, %edx
    wrmsr
    ret

# %rax = TSC. Clobbers %rdx.
read_tsc:
    lfence
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    ret

# One token goes round all vCPUs. A second one is an interrupt delivered
# twice; none is one lost.
on_ipi:
    incq %gs:{IPIS_IN}
    cmpq $0, %gs:{TOKEN}
    je 1f
    pushq %rdi
    pushq %rsi
    pushq %rdx
    pushq %r8
    movl ${E_IPI_TWICE}, %edi
    movq %gs:{IPIS_IN}, %rsi
    movq %gs:{IPIS_OUT}, %rdx
    xorl %r8d, %r8d
    call record
    popq %r8
    popq %rdx
    popq %rsi
    popq %rdi
1:  movq $1, %gs:{TOKEN}
    call end_of_interrupt
    iretq

# The serial port is ready for the next byte.
on_serial:
    pushq %rax
    pushq %rdx
    incq %gs:{SERIAL_IRQS}
    movw $0x3fa, %dx
    inb %dx, %al
    movq $1, %gs:{SERIAL_READY}
    call end_of_interrupt
    popq %rdx
    popq %rax
    iretq

# Error %rdi with what was found (%rsi), what was expected (%rdx) and where
# (%r8). The first is kept. Clobbers nothing.
record:
    pushq %r9
    movl $1, %r9d
    lock xaddq %r9, %gs:{ERRORS}
    testq %r9, %r9
    jnz 1f
    movq %rsi, %gs:{FOUND}
    movq %rdx, %gs:{WANTED}
    movq %r8, %gs:{DETAIL}
    movq %rdi, %gs:{CODE}
1:  popq %r9
    ret
.popsection

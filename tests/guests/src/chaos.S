# Runs random bytes, in the mode that MODE names (16, 32 or 64), from the seed SEED.
#
# Every exception and interrupt refills the arena and starts again in it.  The timer comes
# as an NMI, through the local APIC's LINT0, so that it ends loops and halts too.  The
# machine may end in any way, and may hang; the monitor under it may not.
#include "serial.inc"

	.set ARENA, 0x10000	# 64 KiB in reach of every mode
	.set LOW, 0x8000	# where real mode's code goes
	.set LENGTH, 512	# bytes that are run before the next refill

	# An address without a relocation, which 64-bit code in a 32-bit file cannot have.
#define AT(label) label - image + 0x100000

	.macro timer	# PIT channel 0 at about 1 kHz, all else masked, vectors from 0x20
	.irp byte, 0x11, 0x20, 0x04, 0x01, 0xfe
	mov $\byte, %al
	.if \byte == 0x11
	out %al, $0x20
	.else
	out %al, $0x21
	.endif
	.endr
	mov $0x34, %al
	out %al, $0x43
	mov $0xa9, %al
	out %al, $0x40
	mov $0x04, %al
	out %al, $0x40
	movl $0x1ff, 0xfee000f0	# spurious vector register: enable
	movl $0x400, 0xfee00350	# LVT LINT0: NMI
	.endm

	.macro acknowledge	# by polling: an NMI does not, and the 8259 would stay silent
	mov $0x0c, %al
	out %al, $0x20
	in $0x20, %al
	mov $0x20, %al
	out %al, $0x20
	.endm

	.macro next	# xorshift32 (Marsaglia, 2003) of eax
	mov %eax, %edx
	shl $13, %edx
	xor %edx, %eax
	mov %eax, %edx
	shr $17, %edx
	xor %edx, %eax
	mov %eax, %edx
	shl $5, %edx
	xor %edx, %eax
	.endm

main:
	say "chaos\n"
	timer
#if MODE == 32
	lgdt gdt_pointer
	ljmp $0x08, $1f
1:	mov $idt, %edi
	mov $256, %ecx
	mov $again, %eax
2:	mov %ax, (%edi)
	movw $0x08, 2(%edi)
	movw $0x8e00, 4(%edi)
	shr $16, %eax
	mov %ax, 6(%edi)
	mov $again, %eax
	add $8, %edi
	loop 2b
	lidt idt_pointer
again:
	mov $0x10, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %ss
	mov $stack_top, %esp
	cld
	acknowledge
	mov seed, %eax
	mov $ARENA, %edi
	mov $LENGTH / 4, %ecx
3:	next
	stosl
	loop 3b
	mov %eax, seed
	mov %eax, %ebx
	not %ebx
	mov $ARENA + LENGTH, %esi
	mov $ARENA + 2 * LENGTH, %edi
	pushl $0x202
	pushl $0x08
	pushl $ARENA
	iretl	# which also lets the next NMI come
#elif MODE == 64
	mov $page_tables + 0x1000 + 3, %eax
	mov %eax, page_tables
	mov $page_tables + 0x2000 + 3, %eax
	mov %eax, page_tables + 0x1000
	mov $0x83, %eax
	mov $page_tables + 0x2000, %edi
	mov $512, %ecx
1:	mov %eax, (%edi)
	add $0x200000, %eax
	add $8, %edi
	loop 1b
	mov $page_tables, %eax
	mov %eax, %cr3
	mov %cr4, %eax
	or $0x620, %eax		# PAE, OSFXSR, OSXMMEXCPT
	mov %eax, %cr4
	mov $0xc0000080, %ecx
	rdmsr
	or $0x101, %eax		# LME, SCE
	wrmsr
	mov %cr0, %eax
	or $0x80000001, %eax
	mov %eax, %cr0
	lgdt gdt_pointer
	ljmp $0x18, $2f
	.code64
2:	mov $idt, %edi
	mov $256, %ecx
	mov $again, %eax
3:	mov %ax, (%rdi)
	movl $0x8e010018, 2(%rdi)	# an interrupt gate, on stack 1
	movw $0x10, 6(%rdi)	# the upper half of again's address
	add $16, %edi
	loop 3b
	lidt AT(idt_pointer)
	movw $0x38, %ax
	ltr %ax
again:
	mov $0x10, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov $stack_top, %esp
	cld
	acknowledge
	mov AT(seed), %eax
	mov $ARENA, %edi
	mov $LENGTH / 4, %ecx
4:	next
	stosl
	loop 4b
	mov %eax, AT(seed)
	mov %rax, %rbx
	not %rbx
	mov $ARENA + LENGTH, %esi
	mov $ARENA + 2 * LENGTH, %edi
	pushq $0x10
	pushq %rsp
	pushq $0x202
	pushq $0x18
	pushq $ARENA
	iretq
	.code32
#elif MODE == 16
	mov $low_start, %esi
	mov $LOW, %edi
	mov $low_end - low_start, %ecx
	rep movsb
	xor %edi, %edi
	mov $256, %ecx
	mov $LOW + again - low_start, %eax
	rep stosl
	lgdt gdt_pointer
	ljmp $0x28, $LOW
	.code16
low_start:
	mov $0x30, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %ss
	mov %cr0, %eax
	and $~1, %al
	mov %eax, %cr0
	ljmp $0, $LOW + 1f - low_start
1:	lidt %cs:LOW + ivt_pointer - low_start
again:
	xor %ax, %ax
	mov %ax, %ds
	mov %ax, %ss
	mov $0x7c00, %sp
	mov $ARENA >> 4, %ax
	mov %ax, %es
	cld
	acknowledge
	mov LOW + seed - low_start, %eax
	xor %di, %di
	mov $LENGTH / 4, %cx
2:	next
	stosl
	loop 2b
	mov %eax, LOW + seed - low_start
	mov %eax, %ebx
	not %ebx
	mov $LENGTH, %si
	pushw $0x202
	pushw $ARENA >> 4
	pushw $0
	iretw
ivt_pointer:
	.word 0x3ff
	.long 0
#endif

	.balign 4
seed:	.long SEED
low_end:
	.code32

	.balign 8
gdt:	.quad 0
	.quad 0x00cf9b000000ffff	# 0x08: 32-bit code
	.quad 0x00cf93000000ffff	# 0x10: data
	.quad 0x00af9b000000ffff	# 0x18: 64-bit code
	.quad 0
	.quad 0x00009b000000ffff	# 0x28: 16-bit code
	.quad 0x000093000000ffff	# 0x30: 16-bit data
	.word 0x67, tss - image
	.byte 0x10, 0x89, 0, 0	# 0x38: 64-bit task state, at 0x10xxxx
	.quad 0
gdt_pointer:
	.word . - gdt - 1
	.long gdt, 0
idt_pointer:
	.word 256 * 16 - 1
	.long idt, 0
tss:	.skip 36
	.long stack_top, 0	# IST1
	.skip 60

	.bss
	.balign 4096
idt:	.skip 4096
page_tables:
	.skip 3 * 4096

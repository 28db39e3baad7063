# A disk that a BIOS boots: its first sector has the BIOS show a text and read the second
# sector, which shows another and switches the machine off through PM1 control.
	.code16
	.globl _start
_start:
	jmp $0, $1f
1:	xor %ax, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %ss
	mov $_start, %sp
	mov $first, %si
	call show
	mov $0x0201, %ax	# INT 13h, 2: read one sector, from the drive in DL
	mov $0x0002, %cx
	mov $0, %dh
	mov $second_sector, %bx
	int $0x13
	jnc second_sector
	mov $failed, %si
	call show
2:	hlt
	jmp 2b

show:	lodsb
	test %al, %al
	jz 3f
	mov $0x0e, %ah		# INT 10h, 0Eh: teletype output
	xor %bx, %bx
	int $0x10
	jmp show
3:	ret

first:	.asciz "first sector\r\n"
failed:	.asciz "no second sector\r\n"

	.org 510
	.byte 0x55, 0xaa

second_sector:
	mov $second, %si
	call show
	mov $0x404, %dx
	mov $0x3400, %ax
	out %ax, %dx
4:	hlt
	jmp 4b
second:	.asciz "second sector\r\n"
	.org 1024
